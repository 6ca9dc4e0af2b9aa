"""The main job: speed, memory, drift and greedy agreement at one context, under 10 minutes.

Decode is timed as in suite `decode`, all strategies in one loop; the rest one strategy at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evals import control, greedy, peaks, speed
from evals.config import ConfigError
from evals.noise import Noise
from evals.schema import measured
from evals.strategies import file_name
from evals.suites import decode, drift
from evals.tables import Table, by_strategy
from evals.task import Task

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evals.bench import Bench
    from evals.schema import Row
    from evals.strategies import Strategy

DEFAULTS: dict[str, Any] = {}
NEEDS = {"model", "text"}


def tasks(bench: Bench) -> Iterator[Task]:
    """Yield a task per strategy, and the controls."""
    config = bench.config
    if len(config.context) + len(config.batch) > 2:
        raise ConfigError(
            "suite 'quick' measures one context and one batch; 'decode', 'prefill' and 'memory' "
            "take several"
        )
    batch, context = config.batch[0], config.context[0]
    steps = config.warmup + config.decode_steps
    size = 2 * bench.filler.exact_bytes(batch, context)

    def timing(strategy: Strategy) -> float:
        warm_up = bench.answer_seconds(strategy, batch, speed.WARMUP_TOKENS, 1)
        return warm_up + bench.answer_seconds(strategy, batch, context, steps)

    def one(strategy: Strategy) -> Iterator[dict[str, Any]]:
        yield from timed(bench, strategy)
        yield from drift.drifted(bench, strategy)
        tokens = bench.greedy_tokens(strategy)
        yield greedy.agreement(tokens, bench.exact_tokens)
        bench.tick()

    for strategy in bench.strategies:
        yield Task(
            f"quick/{file_name(strategy.name)}",
            strategy.name,
            strategy,
            lambda strategy=strategy: one(strategy),
            timing(strategy)
            + drift.seconds(bench, strategy)
            + bench.answer_seconds(strategy, batch, context, config.new_tokens),
            size,
            2 + config.windows,
        )
    yield from drift.controls(bench, "quick")
    same = control.Same()
    yield Task("quick/same", same.name, same, lambda: timed(bench, same), timing(same), size)
    field = [*bench.strategies, same]
    yield Task(
        "quick/decode",
        "decode, all in one loop",
        bench.strategies[0],
        lambda: decode.measure(bench, field, batch, context, None),
        config.repeats * steps * sum(bench.pace.step(s, batch, context) for s in field),
        size,
        config.repeats * len(field),
    )


def timed(bench: Bench, strategy: Strategy) -> Iterator[dict[str, Any]]:
    """Yield prefill and peak memory of one strategy."""
    config = bench.config
    prompt = bench.prompt(config.batch[0], config.context[0])
    speed.warm_up(bench.model, strategy, prompt)
    steps = config.warmup + config.decode_steps
    peak = {"peak": peaks.allocated(bench.device)}
    seconds, rows = speed.prefill_and_peaks(bench.model, strategy, prompt, steps, peak)
    yield measured("prefill", seconds)
    yield from rows
    bench.tick()


def tables(config: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Return a line per strategy."""
    table = by_strategy("", rows, Noise(rows))
    how = {row["note"] for row in rows if row["metric"] == "peak_decode"}
    said = [
        f"Batch {config['batch'][0]}, context {config['context'][0]}. Decode: "
        f"{config['repeats']} rounds of {config['decode_steps']} steps after {config['warmup']} of "
        "warm-up, all strategies in one loop. Held: after such a round. Peak memory: "
        f"{', '.join(map(str, how))}. Greedy: of {config['new_tokens']} tokens.",
        drift.caption(config),
    ]
    return [table._replace(notes=said + table.notes)]
