"""What memory buys: bytes held, words found, drift and speed of methods, budgets and codecs.

Each method of METHODS with each of BUDGETS, alone and with each codec, in one table: words hidden
and asked for as in `retrieval`, drift of a text that goes on as in `stream`, and decoding, all in
one loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evals.measure.needles import Haystack
from evals.rows.noise import Noise
from evals.rows.schema import at
from evals.rows.tables import by_strategy
from evals.rows.task import Task
from evals.setup.config import ConfigError
from evals.setup.contenders import EXACT, file_name
from evals.setup.control import Same
from evals.suites import decode, drift, retrieval

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evals.measure.session import Session
    from evals.rows.schema import Row
    from evals.rows.tables import Table
    from evals.setup.contenders import Contender

METHODS = "snapkv", "expected"
BUDGETS = 512, 128
CODECS = "", "+int4"
DEFAULTS: dict[str, Any] = {
    "strategies": (
        EXACT,
        "int8",
        "int4",
        "window(length=512)",
        *(
            f"{method}(budget={budget}){codec}"
            for method in METHODS
            for budget in BUDGETS
            for codec in CODECS
        ),
    )
}
NEEDS = {"model", "text"}


def tasks(session: Session) -> Iterator[Task]:
    """Yield a task per contender, the controls of `drift`, and decoding of all."""
    hay, config = Haystack(session), session.config
    if len(config.context) + len(config.batch) > 2:
        raise ConfigError(
            "suite 'front' measures one context and one batch; 'retrieval' and 'decode' take "
            "several"
        )
    batch, context = config.batch[0], config.context[0]
    place = {"batch": batch, "context": context}
    hay.trial(context, retrieval.DEPTHS, 0)  # refuses a length that is too small, before any work

    def one(contender: Contender) -> Iterator[dict[str, Any]]:
        yield from retrieval.measure(session, hay, contender, context)
        yield from (at(row, **place) for row in drift.drifted(session, contender))

    for contender in session.contenders:
        yield Task(
            f"front/{file_name(contender.name)}",
            contender.name,
            contender,
            lambda contender=contender: one(contender),
            retrieval.seconds(session, contender, context) + drift.seconds(session, contender),
            2 * session.filler.exact_bytes(1, max(context, config.window)),
            config.windows + config.trials * (len(retrieval.DEPTHS) + 1),
            shared=True,
        )
    yield from drift.controls(session, "front", **place)
    contenders = [*session.contenders, Same()]
    steps = config.warmup + config.decode_steps
    yield Task(
        "front/decode",
        "decode, all in one loop",
        session.contenders[0],
        lambda: decoded(session, contenders, batch, context),
        config.repeats * steps * sum(session.predict.step(s, batch, context) for s in contenders),
        2 * session.filler.exact_bytes(batch, context),
        config.repeats * len(contenders),
    )


def decoded(
    session: Session, contenders: list[Contender], batch: int, context: int
) -> Iterator[dict[str, Any]]:
    """Yield what decoding says but what is held, which is counted right after a prompt."""
    for row in decode.measure(session, contenders, batch, context, None):
        if row["metric"] != "bytes_held":
            yield row


def tables(config: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Return a line per contender, the one that holds most first."""
    held = {r["strategy"]: r["value"] for r in rows if r["metric"] == "bytes_held"}
    rows = sorted(rows, key=lambda row: -held.get(row["strategy"], 0.0))  # controls last
    table = by_strategy("", retrieval.pooled(rows), Noise(rows))
    said = [
        f"{config['context'][0]:,} tokens.",
        retrieval.method(config),
        drift.method(config),
        f"Decode: {config['repeats']} rounds of {config['decode_steps']} steps after "
        f"{config['warmup']} of warm-up, all strategies in one loop, K/V random.",
    ]
    return [table._replace(notes=said + table.notes)]
