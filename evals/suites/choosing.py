"""What choosing costs: its share of prefill, and of decode steps, for methods that choose tokens.

Of each round's prefill of a whole prompt, and of the steps after it: as many as there are between
two choices, so that one of them has a choice. The clock runs in the layers, around all that is
done to choose, from the queries that attention has shown to the memory that is free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import kvplug
from evals.measure.choosing import clocked
from evals.measure.clock import step
from evals.measure.prefill import warm_up
from evals.rows.schema import at, measured
from evals.rows.tables import Table, by_size
from evals.rows.task import Task
from evals.setup.config import ConfigError
from evals.setup.contenders import EXACT, file_name
from kvplug.retention.base import Scored

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evals.measure.session import Session
    from evals.rows.schema import Row
    from evals.setup.contenders import Contender

DEFAULTS: dict[str, Any] = {
    "strategies": ("snapkv(budget=1024)", "expected(budget=1024)", "h2o(budget=1024)")
}
NEEDS = {"model", "text"}


def tasks(session: Session) -> Iterator[Task]:
    """Yield a task per contender, batch and context."""
    contenders = [one for one in session.contenders if one.name != EXACT]
    cycles = {one: cycle(one) for one in contenders}  # before any work
    repeats = session.config.repeats
    for batch, context, note in session.cells():
        for contender, steps in cycles.items():
            yield Task(
                f"choosing/b{batch}/t{context}/{file_name(contender.name)}",
                f"{contender.name}, batch {batch}, context {context:,}",
                contender,
                lambda cell=(contender, steps, batch, context, note): measure(session, *cell),
                repeats * session.predict.answer(contender, batch, context, steps),
                2 * session.filler.exact_bytes(batch, context),
                repeats,
            )


def cycle(contender: Contender) -> int:
    """Return how many steps have one choice."""
    strategy = kvplug.parse(contender.name) if ":" not in contender.name else None
    if strategy is None or not isinstance(strategy.retention, Scored) or not strategy.lossless:
        raise ConfigError(
            f"strategy {contender.name!r}: suite 'choosing' takes methods that choose by content, "
            "without a codec, such as 'snapkv(budget=1024)'"
        )
    return strategy.retention.every


def measure(
    session: Session, contender: Contender, steps: int, batch: int, context: int, note: str | None
) -> Iterator[dict[str, Any]]:
    """Yield the shares of one contender, batch and context, in percent, a sample per round."""
    prompt = session.prompt(batch, context)
    warm_up(session.model, contender, prompt)
    shares: dict[str, list[float]] = {"choosing_prefill": [], "choosing_decode": []}
    for _ in range(session.config.repeats):
        cache = contender.build(session.model.config, context + steps)
        cache.expect(context)
        with clocked(session.device) as spent:
            token, prefill = step(session.model, cache, prompt)
            choosing, decode = spent.seconds, 0.0
            for _ in range(steps):
                token, seconds = step(session.model, cache, token)
                decode += seconds
        shares["choosing_prefill"].append(100 * choosing / prefill)
        shares["choosing_decode"].append(100 * (spent.seconds - choosing) / decode)
        session.tick()
    for metric, samples in shares.items():
        yield at(measured(metric, *samples, note=note), batch=batch, context=context)


def tables(config: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Return a table per batch and context."""
    return by_size(rows, f"{config['repeats']} rounds each.")
