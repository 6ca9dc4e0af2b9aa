"""Whether words hidden in a long text are found by questions that it was not kept for.

The half of `retrieval` that asks after the text: one prompt a text in place of six, for methods
that let tokens of a prefix go before anybody has asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evals.suites import retrieval

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evals.measure.session import Session
    from evals.rows.schema import Row
    from evals.rows.tables import Table
    from evals.rows.task import Task

DEFAULTS: dict[str, Any] = {
    "strategies": (
        "transformers:dynamic",
        "expected(budget=512)",
        "h2o(budget=512)",
        "keydiff(budget=512)",
        "snapkv(budget=512)",
    ),
    "trials": 8,
}
NEEDS = {"model", "text"}


def tasks(session: Session) -> Iterator[Task]:
    """Yield a task per contender, exact one first, and length."""
    return retrieval.of_texts(session, "unseen", in_prompt=False)


def tables(config: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Return a table per length."""
    return retrieval.tables(config, rows, in_prompt=False)
