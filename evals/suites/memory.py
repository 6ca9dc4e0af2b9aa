"""Bytes held by a walk over the cache, per token, at the peaks, and against `kvplug.estimate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import kvplug
from evals.measure import peaks
from evals.measure.clock import step
from evals.measure.memory import checked_bytes
from evals.measure.prefill import WARMUP_TOKENS, prefill_and_peaks, warm_up
from evals.rows.schema import at, measured
from evals.rows.tables import Table, by_size
from evals.rows.task import Task
from evals.setup.contenders import Rival, file_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evals.measure.session import Session
    from evals.rows.schema import Row
    from evals.setup.contenders import Contender

DEFAULTS: dict[str, Any] = {"context": (512, 2048, 6000), "decode_steps": 8}
NEEDS = {"model", "text"}


def tasks(session: Session) -> Iterator[Task]:
    """Yield a task per batch, context and contender."""
    for batch, context, note in session.cells():
        for contender in session.contenders:
            yield Task(
                f"memory/b{batch}/t{context}/{file_name(contender.name)}",
                f"{contender.name}, batch {batch}, context {context:,}",
                contender,
                lambda cell=(contender, batch, context, note): measure(session, *cell),
                session.predict.answer(contender, batch, WARMUP_TOKENS, 1)
                + session.predict.answer(contender, batch, context, 0)
                + session.predict.answer(contender, batch, context, session.config.decode_steps),
                3 * session.filler.exact_bytes(batch, context),
            )


def measure(
    session: Session, contender: Contender, batch: int, context: int, note: str | None
) -> Iterator[dict[str, Any]]:
    """Yield bytes held after a true prefill, and both peaks."""
    model, place = session.model, {"batch": batch, "context": context}
    prompt = session.prompt(batch, context)
    warm_up(model, contender, prompt)
    # a static cache of exactly this length: what `estimate` counts
    cache = contender.build(model.config, context)
    step(model, cache, prompt)
    held = checked_bytes(cache)
    yield at(measured("bytes_held", held, note=note), **place)
    yield at(measured("bytes_per_token", held / (batch * context)), **place)
    if not isinstance(contender, Rival):
        guess = kvplug.estimate(
            contender.name, model.config, context=context, batch=batch, dtype=model.dtype
        )
        yield at(measured("bytes_estimated", guess), **place)
        yield at(measured("estimate_error", 100 * (guess / held - 1)), **place)
    del cache
    both = {"rss": peaks.Resident(), "peak": peaks.allocated(session.device)}
    _, rows = prefill_and_peaks(model, contender, prompt, session.config.decode_steps, both)
    for row in rows:
        yield at(row, **place)


def tables(config: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Return a table per batch and context."""
    measures = "peak_decode", "rss_decode"
    how = dict.fromkeys(row["note"] for row in rows if row["metric"] in measures and row["note"])
    said = f"Held after prefill. Peak in decode over {config['decode_steps']} steps."
    return by_size(rows, f"{said} Peaks by {', '.join(how)}.")
