"""Seconds to the first token over contexts and batches, strategies in alternating order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evals.measure.clock import step
from evals.measure.interleave import interleave, pooled, speedup
from evals.measure.prefill import warm_up
from evals.rows.noise import Noise
from evals.rows.schema import at, failed, measured
from evals.rows.tables import Table, grid, timing
from evals.rows.task import Task
from evals.setup.contenders import EXACT
from evals.setup.control import Same

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from evals.measure.session import Session
    from evals.rows.schema import Row
    from evals.setup.contenders import Contender

DEFAULTS: dict[str, Any] = {"context": (512, 2048, 4096)}
NEEDS = {"model", "text"}


def tasks(session: Session) -> Iterator[Task]:
    """Yield a task per batch and context, all contenders in it."""
    contenders, repeats = [*session.contenders, Same()], session.config.repeats
    for batch, context, note in session.cells():
        yield Task(
            f"prefill/b{batch}/t{context}",
            f"batch {batch}, context {context:,}",
            session.contenders[0],
            lambda cell=(batch, context, note): measure(session, contenders, *cell),
            repeats * len(contenders) * batch * session.machine.prefill(context),
            3 * session.filler.exact_bytes(batch, context),
            repeats * len(contenders),
        )


def measure(
    session: Session, contenders: list[Contender], batch: int, context: int, note: str | None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one batch and context."""
    rounds = interleave(
        {s: runner(session, s, batch, context) for s in contenders},
        session.config.repeats,
        session.tick,
    )
    for contender in contenders:
        own, place = rounds[contender], {"batch": batch, "context": context}
        if isinstance(own, Exception):
            yield at(failed(own), contender, **place)
            continue
        yield at(measured("prefill", *pooled(own), note=note), contender, **place)
        if ratio := speedup(own, rounds[contenders[0]]):
            yield at(ratio, contender, **place)


def runner(
    session: Session, contender: Contender, batch: int, context: int
) -> Callable[[], list[float]]:
    """Return what prefills one new cache; before the first, another one to warm up."""
    prompt, warm = session.prompt(batch, context), []

    def once() -> list[float]:
        if not warm:
            warm.append(warm_up(session.model, contender, prompt))
        cache = contender.build(session.model.config, context)
        return [step(session.model, cache, prompt)[1]]

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
