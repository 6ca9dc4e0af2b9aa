"""How far caches move predictions: perplexity, KL and top-1 agreement, by position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evals import control
from evals import drift as measuring
from evals.schema import at, measured
from evals.strategies import EXACT, file_name
from evals.tables import Table, by_strategy
from evals.task import Task

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evals.bench import Bench
    from evals.schema import Row
    from evals.strategies import Strategy

DEFAULTS: dict[str, Any] = {"windows": 4}
NEEDS = {"model", "text"}


def tasks(bench: Bench) -> Iterator[Task]:
    """Yield a task per strategy, and the controls."""
    place = {"batch": 1, "context": bench.config.window}

    def one(strategy: Strategy) -> Iterator[dict[str, Any]]:
        return (at(row, **place) for row in drifted(bench, strategy, by_position=True))

    for strategy in bench.strategies:
        yield Task(
            f"drift/{file_name(strategy.name)}",
            strategy.name,
            strategy,
            lambda strategy=strategy: one(strategy),
            seconds(bench, strategy),
            2 * bench.filler.exact_bytes(1, bench.config.window),
            bench.config.windows,
            shared=True,
        )
    yield from controls(bench, "drift", **place)


def controls(bench: Bench, suite: str, **place: int) -> Iterator[Task]:
    """Yield the tasks without which drift figures mean nothing."""
    broken, plain = control.Broken(), control.Plain()
    yield Task(
        f"{suite}/broken",
        broken.name,
        broken,
        lambda: (at(row, **place) for row in drifted(bench, broken)),
        seconds(bench, broken),
        steps=bench.config.windows,
        shared=True,
    )
    yield Task(
        f"{suite}/plain",
        plain.name,
        plain,
        lambda: (at(row, **place) for row in undrifted(bench)),
        bench.config.windows * bench.machine.prefill(bench.config.window),
        shared=True,
    )


def drifted(
    bench: Bench, strategy: Strategy, by_position: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield a strategy's drift; raise if it is a control and says that nothing can be trusted."""
    positions = bench.drift(strategy)
    result = measuring.summary(positions)
    if strategy.name == EXACT:
        control.check_exact(result)
    if isinstance(strategy, control.Broken):
        control.check_broken(result)
    yield from measuring.rows(positions)  # refuses what is no number
    bench.save("drift", file_name(strategy.name), strategy=strategy.name, **result)
    if by_position:
        for label, first, last in measuring.buckets(bench.config):
            for row in measuring.rows(positions, first, last):
                yield at(row, case=label)


def undrifted(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield the perplexity without a cache; raise if the exact cache's is another."""
    plain = measuring.plain_perplexity(bench.model, bench.windows, bench.config)
    exact = measuring.exact_perplexity(bench.exact, bench.windows, bench.config)
    control.check_plain(plain, exact, bench.config.dtype)
    yield measured("perplexity", plain, note="one forward per window with labels, no cache")
    yield measured("perplexity_delta", 100 * (plain / exact - 1))


def seconds(bench: Bench, strategy: Strategy) -> float:
    """Predict the time of one strategy; the exact cache's is measured twice."""
    times = 2 if strategy.name == EXACT else 1
    return times * bench.config.windows * bench.pace.chunks(strategy, bench.config.window)


def caption(config: dict[str, Any]) -> str:
    """Return how drift was measured."""
    return (
        f"Drift: {config['windows']} windows of {config['window']} tokens, fed {config['chunk']} "
        f"at a time, first {config['skip']} skipped."
    )


def tables(config: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Return a table over all positions, and one of KL by position."""
    whole = by_strategy("", [row for row in rows if not row["case"]])
    return [whole._replace(notes=[caption(config)]), by_position(rows)]


def by_position(rows: list[Row]) -> Table:
    """Return KL per strategy and range of positions."""
    found = {
        (row["strategy"], row["case"]): row["value"]
        for row in rows
        if row["metric"] == "kl" and row["case"]
    }
    labels = list(dict.fromkeys(case for _, case in found))
    body = [
        [
            name,
            *(f"{found[name, label]:.6f}" if (name, label) in found else "-" for label in labels),
        ]
        for name in dict.fromkeys(name for name, _ in found)
    ]
    return Table("KL by position, nat ↓", ["strategy", *labels], body, [])
