"""What codecs lose on a model with a large constant in its keys: variants of it, each against its
own exact cache.

A constant of 10 and 100 times the root mean square of a layer's keys, in one channel of each head:
the slowest that rotary positions turn (`low`), and one that goes round within a block (`mid`).
Layers whose keys were given more bits than asked for (`stats()["widened"]`) are counted, and where
there are no more to give it says that keys swing (`stats()["swinging"]`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evals.measure import drift as measuring
from evals.measure.biased import biased, channel
from evals.measure.memory import account
from evals.rows.schema import at, measured
from evals.rows.tables import Table
from evals.rows.task import Task
from evals.setup.contenders import EXACT
from evals.suites import drift

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evals.measure.session import Session
    from evals.rows.schema import Row

PERIODS = {"low": 1e9, "mid": 64.0}  # tokens in which the channel goes round
TIMES = 10, 100
PLAIN = "plain"
DEFAULTS: dict[str, Any] = {
    "strategies": (EXACT, "int8", "k8v4", "int4", "int3", "int2"),
    "windows": 1,
    "window": 1024,
}
NEEDS = {"model", "text"}


def tasks(session: Session) -> Iterator[Task]:
    """Yield a task per variant: the exact cache on it, then all others."""
    config = session.config
    for label, period, times in variants():
        yield Task(
            f"bias/{label.replace(' ', '-')}",
            label,
            session.contenders[0],
            lambda label=label, period=period, times=times: of(session, label, period, times),
            sum(drift.seconds(session, contender) for contender in session.contenders),
            2 * session.filler.exact_bytes(1, config.window),
            config.windows * len(session.contenders),
            place={"batch": 1, "context": config.window},
            shared=True,
        )


def variants() -> Iterator[tuple[str, float, float]]:
    """Yield name, period and size of each variant."""
    yield PLAIN, PERIODS["low"], 0
    for where, period in PERIODS.items():
        for times in TIMES:
            yield f"{where} x{times}", period, times


def of(session: Session, label: str, period: float, times: float) -> Iterator[dict[str, Any]]:
    """Yield KL and top-1 of every contender on one variant."""
    model, windows, config = session.model, session.windows, session.config
    exact, *others = session.contenders
    with biased(model, windows[0], channel(model, period), times):
        kept = measuring.exact_predictions(model, exact, windows, config, session.tick)
        whole = measuring.exact_perplexity(kept, windows, config)
        yield at(measured("perplexity", whole), case=label)
        for contender in others:
            told: list[dict[str, Any]] = []
            positions = measuring.measure(
                model,
                contender,
                windows,
                kept,
                config,
                session.tick,
                lambda cache, told=told: told.append(account(cache)),
            )
            for row in measuring.rows(positions):
                yield at(row, contender, case=label, stats=told[-1])


def tables(config: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Return KL per contender and variant, and what the guard did."""
    labels = [label for label, _, _ in variants()]
    kl: dict[str, dict[str, str]] = {}
    exact: dict[str, str] = {}
    for row in rows:
        if row["metric"] == "kl":
            kl.setdefault(row["strategy"], {})[row["case"]] = f"{row['value']:.6f}{_told(row)}"
        elif row["metric"] == "perplexity" and row["strategy"] == EXACT:
            exact[row["case"]] = f"{row['value']:.2f}"
    body = [["perplexity of the exact cache", *(exact.get(label, "-") for label in labels)]]
    body += [[name, *(own.get(label, "-") for label in labels)] for name, own in kl.items()]
    return [Table("KL on each variant, nat ↓", ["strategy", *labels], body, [drift.method(config)])]


def _told(row: Row) -> str:
    stats = row["stats"] or {}
    wide = sum(map(len, stats.get("widened", {}).values()))
    if wide:
        return f", {wide} layers wider"
    return ", keys swing" if stats.get("swinging") else ""
