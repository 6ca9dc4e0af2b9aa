"""How far caches move predictions: perplexity, KL and top-1 agreement, by position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evals.measure import drift as measuring
from evals.measure.memory import account
from evals.rows.schema import at, measured
from evals.rows.tables import COLUMNS, Table, by_strategy
from evals.rows.task import Task
from evals.setup import control
from evals.setup.contenders import EXACT, file_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evals.measure.session import Session
    from evals.rows.schema import Row
    from evals.setup.contenders import Contender

DEFAULTS: dict[str, Any] = {"windows": 4}
NEEDS = {"model", "text"}


def tasks(session: Session) -> Iterator[Task]:
    """Yield a task per contender, and the controls."""
    return of_windows(session, "drift")


def of_windows(session: Session, suite: str) -> Iterator[Task]:
    """Yield the tasks of a suite that feeds windows and nothing else."""
    place = {"batch": 1, "context": session.config.window}

    def one(contender: Contender) -> Iterator[dict[str, Any]]:
        for row in drifted(session, contender, by_position=True):
            yield at(row, **place)
        told = row["stats"]
        for metric in ("bytes_held", "tokens_held"):
            held = measured(metric, told[metric], note="at the end of a window", stats=told)
            yield at(held, **place)

    for contender in session.contenders:
        yield Task(
            f"{suite}/{file_name(contender.name)}",
            contender.name,
            contender,
            lambda contender=contender: one(contender),
            seconds(session, contender),
            2 * session.filler.exact_bytes(1, session.config.window),
            session.config.windows,
            shared=True,
        )
    yield from controls(session, suite, **place)


def controls(session: Session, suite: str, **place: int) -> Iterator[Task]:
    """Yield the tasks without which drift figures mean nothing."""
    broken, plain = control.Broken(), control.Plain()
    yield Task(
        f"{suite}/broken",
        broken.name,
        broken,
        lambda: (at(row, **place) for row in drifted(session, broken)),
        seconds(session, broken),
        steps=session.config.windows,
        shared=True,
    )
    yield Task(
        f"{suite}/plain",
        plain.name,
        plain,
        lambda: (at(row, **place) for row in undrifted(session)),
        session.config.windows * session.machine.prefill(session.config.window),
        shared=True,
    )


def drifted(
    session: Session, contender: Contender, by_position: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield a contender's drift; raise if it is a control and says that nothing can be trusted."""
    told: list[dict[str, Any]] = []  # by the cache of each window, at its end
    positions = session.drift(contender, lambda cache: told.append(account(cache)))
    result = measuring.overall(positions)
    if contender.name == EXACT:
        control.check_exact(result)
    if isinstance(contender, control.Broken):
        control.check_broken(result)
    for row in measuring.rows(positions):  # refuses what is no number
        yield row | {"stats": told[-1]}
    session.save("drift", file_name(contender.name), strategy=contender.name, **result)
    if by_position:
        for label, first, last in measuring.buckets(session.config):
            for row in measuring.rows(positions, first, last):
                yield at(row, case=label, stats=told[-1])


def undrifted(session: Session) -> Iterator[dict[str, Any]]:
    """Yield the perplexity without a cache; raise if the exact cache's is another."""
    plain = measuring.plain_perplexity(session.model, session.windows, session.config)
    exact = measuring.exact_perplexity(session.exact, session.windows, session.config)
    control.check_plain(plain, exact, session.config.dtype)
    yield measured("perplexity", plain, note="one forward per window with labels, no cache")
    yield measured("perplexity_delta", 100 * (plain / exact - 1))


def seconds(session: Session, contender: Contender) -> float:
    """Predict the time of one contender; the exact cache's is measured twice."""
    times = 2 if contender.name == EXACT else 1
    return times * session.config.windows * session.predict.chunks(contender, session.config.window)


def method(config: dict[str, Any]) -> str:
    """Return how drift was measured."""
    return (
        f"Drift: {config['windows']} windows of {config['window']} tokens, fed {config['chunk']} "
        f"at a time, first {config['skip']} skipped."
    )


def tables(config: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Return a table over all positions, and one of KL by position."""
    whole = by_strategy("", [row for row in rows if not row["case"]])
    return [whole._replace(notes=[method(config)]), by_range(rows, "kl", "KL by position, nat ↓")]


def by_range(rows: list[Row], metric: str, title: str) -> Table:
    """Return a metric per contender and range of positions."""
    found = {
        (row["strategy"], row["case"]): COLUMNS[metric][1](row, None)
        for row in rows
        if row["metric"] == metric and isinstance(row["case"], str)  # a dict is no range
    }
    labels = list(dict.fromkeys(case for _, case in found))
    body = [
        [name, *(found.get((name, label), "-") for label in labels)]
        for name in dict.fromkeys(name for name, _ in found)
    ]
    return Table(title, ["strategy", *labels], body, [])
