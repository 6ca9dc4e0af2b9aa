"""Seconds to the first token over contexts and batches, strategies in alternating order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evals import speed
from evals.clock import step
from evals.control import Same
from evals.noise import Noise
from evals.race import pooled, race, speedup
from evals.schema import at, failed, measured
from evals.strategies import EXACT
from evals.tables import Table, grid, timing
from evals.task import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from evals.bench import Bench
    from evals.schema import Row
    from evals.strategies import Strategy

DEFAULTS: dict[str, Any] = {"context": (512, 2048, 4096)}
NEEDS = {"model", "text"}


def tasks(bench: Bench) -> Iterator[Task]:
    """Yield a task per batch and context, all strategies in it."""
    field, repeats = [*bench.strategies, Same()], bench.config.repeats
    for batch, context, note in bench.cells():
        yield Task(
            f"prefill/b{batch}/t{context}",
            f"batch {batch}, context {context:,}",
            bench.strategies[0],
            lambda cell=(batch, context, note): measure(bench, field, *cell),
            repeats * len(field) * batch * bench.machine.prefill(context),
            3 * bench.filler.exact_bytes(batch, context),
            repeats * len(field),
        )


def measure(
    bench: Bench, field: list[Strategy], batch: int, context: int, note: str | None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one batch and context."""
    laps = race(
        {s: runner(bench, s, batch, context) for s in field}, bench.config.repeats, bench.tick
    )
    for strategy in field:
        own, place = laps[strategy], {"batch": batch, "context": context}
        if isinstance(own, Exception):
            yield at(failed(own), strategy, **place)
            continue
        yield at(measured("prefill", *pooled(own), note=note), strategy, **place)
        if ratio := speedup(own, laps[field[0]]):
            yield at(ratio, strategy, **place)


def runner(bench: Bench, strategy: Strategy, batch: int, context: int) -> Callable[[], list[float]]:
    """Return what prefills one new cache; before the first, another one to warm up."""
    prompt, warm = bench.prompt(batch, context), []

    def once() -> list[float]:
        if not warm:
            warm.append(speed.warm_up(bench.model, strategy, prompt))
        cache = strategy.build(bench.model.config, context)
        return [step(bench.model, cache, prompt)[1]]

    return once


def tables(config: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Return a table per batch."""
    off = Noise(rows)
    made = [
        grid(
            f"prefill, s ↓ (times as fast as {EXACT} ↑), batch {batch}",
            [row for row in rows if row["batch"] == batch],
            timing("prefill", ".2f", off),
        )
        for batch in config["batch"]
    ]
    made[-1] = made[-1]._replace(
        notes=[f"Median of {config['repeats']} prefills of text.", *off.lines()]
    )
    return made
