"""Bytes held by a walk over the cache, per token, at the peaks, and against `kvplug.estimate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import kvplug
from evals import peaks, speed
from evals.clock import step
from evals.memory import checked_bytes
from evals.schema import at, measured
from evals.strategies import Rival, file_name
from evals.tables import Table, by_strategy
from evals.task import Task

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evals.bench import Bench
    from evals.schema import Row
    from evals.strategies import Strategy

DEFAULTS: dict[str, Any] = {"context": (512, 2048, 6000), "decode_steps": 8}
NEEDS = {"model", "text"}


def tasks(bench: Bench) -> Iterator[Task]:
    """Yield a task per batch, context and strategy."""
    for batch, context, note in bench.cells():
        for strategy in bench.strategies:
            yield Task(
                f"memory/b{batch}/t{context}/{file_name(strategy.name)}",
                f"{strategy.name}, batch {batch}, context {context:,}",
                strategy,
                lambda cell=(strategy, batch, context, note): measure(bench, *cell),
                bench.answer_seconds(strategy, batch, speed.WARMUP_TOKENS, 1)
                + bench.answer_seconds(strategy, batch, context, 0)
                + bench.answer_seconds(strategy, batch, context, bench.config.decode_steps),
                3 * bench.filler.exact_bytes(batch, context),
            )


def measure(
    bench: Bench, strategy: Strategy, batch: int, context: int, note: str | None
) -> Iterator[dict[str, Any]]:
    """Yield bytes held after a true prefill, and both peaks."""
    model, place = bench.model, {"batch": batch, "context": context}
    prompt = bench.prompt(batch, context)
    speed.warm_up(model, strategy, prompt)
    # a static cache of exactly this length: what `estimate` counts
    cache = strategy.build(model.config, context)
    step(model, cache, prompt)
    held = checked_bytes(cache)
    yield at(measured("bytes_held", held, note=note), **place)
    yield at(measured("bytes_per_token", held / (batch * context)), **place)
    if not isinstance(strategy, Rival):
        guess = kvplug.estimate(
            strategy.name, model.config, context=context, batch=batch, dtype=model.dtype
        )
        yield at(measured("bytes_estimated", guess), **place)
        yield at(measured("estimate_error", 100 * (guess / held - 1)), **place)
    del cache
    both = {"rss": peaks.Resident(), "peak": peaks.allocated(bench.device)}
    _, rows = speed.prefill_and_peaks(model, strategy, prompt, bench.config.decode_steps, both)
    for row in rows:
        yield at(row, **place)


def tables(config: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Return a table per batch and context."""
    cells = dict.fromkeys((row["batch"], row["context"]) for row in rows)
    measures = "peak_decode", "rss_decode"
    how = dict.fromkeys(row["note"] for row in rows if row["metric"] in measures and row["note"])
    made = [
        by_strategy(
            f"batch {batch}, context {context:,}",
            [row for row in rows if (row["batch"], row["context"]) == (batch, context)],
        )
        for batch, context in sorted(cells)
    ]
    if made:
        said = f"Held after prefill. Peak in decode over {config['decode_steps']} steps."
        made[-1] = made[-1]._replace(notes=[f"{said} Peaks by {', '.join(how)}."])
    return made
