"""The main job: speed, memory, drift and greedy agreement at one context, under 10 minutes.

Decode is timed as in suite `decode`, all strategies in one loop; the rest one strategy at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evals.measure import greedy, peaks
from evals.measure.prefill import WARMUP_TOKENS, prefill_and_peaks, warm_up
from evals.rows.noise import Noise
from evals.rows.schema import measured
from evals.rows.tables import Table, by_strategy
from evals.rows.task import Task
from evals.setup import control
from evals.setup.config import ConfigError
from evals.setup.contenders import file_name
from evals.suites import decode, drift

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evals.measure.session import Session
    from evals.rows.schema import Row
    from evals.setup.contenders import Contender

DEFAULTS: dict[str, Any] = {}
NEEDS = {"model", "text"}


def tasks(session: Session) -> Iterator[Task]:
    """Yield a task per contender, and the controls."""
    config = session.config
    if len(config.context) + len(config.batch) > 2:
        raise ConfigError(
            "suite 'quick' measures one context and one batch; 'decode', 'prefill' and 'memory' "
            "take several"
        )
    batch, context = config.batch[0], config.context[0]
    steps = config.warmup + config.decode_steps
    size = 2 * session.filler.exact_bytes(batch, context)

    def timing(contender: Contender) -> float:
        before = session.predict.answer(contender, batch, WARMUP_TOKENS, 1)
        return before + session.predict.answer(contender, batch, context, steps)

    def one(contender: Contender) -> Iterator[dict[str, Any]]:
        yield from prefilled(session, contender)
        yield from drift.drifted(session, contender)
        tokens = session.greedy_tokens(contender)
        yield greedy.agreement(tokens, session.exact_tokens)
        session.tick()

    for contender in session.contenders:
        yield Task(
            f"quick/{file_name(contender.name)}",
            contender.name,
            contender,
            lambda contender=contender: one(contender),
            timing(contender)
            + drift.seconds(session, contender)
            + session.predict.answer(contender, batch, context, config.new_tokens),
            size,
            2 + config.windows,
        )
    yield from drift.controls(session, "quick")
    same = control.Same()
    yield Task("quick/same", same.name, same, lambda: prefilled(session, same), timing(same), size)
    contenders = [*session.contenders, same]
    yield Task(
        "quick/decode",
        "decode, all in one loop",
        session.contenders[0],
        lambda: decode.measure(session, contenders, batch, context, None),
        config.repeats * steps * sum(session.predict.step(s, batch, context) for s in contenders),
        size,
        config.repeats * len(contenders),
    )


def prefilled(session: Session, contender: Contender) -> Iterator[dict[str, Any]]:
    """Yield prefill and peak memory of one contender."""
    config = session.config
    prompt = session.prompt(config.batch[0], config.context[0])
    warm_up(session.model, contender, prompt)
    steps = config.warmup + config.decode_steps
    peak = {"peak": peaks.allocated(session.device)}
    seconds, rows = prefill_and_peaks(session.model, contender, prompt, steps, peak)
    yield measured("prefill", seconds)
    yield from rows
    session.tick()


def tables(config: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Return a line per contender."""
    table = by_strategy("", rows, Noise(rows))
    how = {row["note"] for row in rows if row["metric"] == "peak_decode"}
    said = [
        f"Batch {config['batch'][0]}, context {config['context'][0]}. Decode: "
        f"{config['repeats']} rounds of {config['decode_steps']} steps after {config['warmup']} of "
        "warm-up, all strategies in one loop. Held: after such a round. Peak memory: "
        f"{', '.join(map(str, how))}. Greedy: of {config['new_tokens']} tokens.",
        drift.method(config),
    ]
    return [table._replace(notes=said + table.notes)]
