"""What retention costs a text that goes on: KL and top-1 under eviction again and again.

`drift` with methods that drop tokens in place of codecs: text is fed `chunk` tokens at a time, so
that there is an eviction after every chunk once the budget is full, and what is lost shows by
position. Positions before the budget is full are exact, and lower a mean over all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evals.suites import drift

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evals.measure.session import Session
    from evals.rows.schema import Row
    from evals.rows.tables import Table
    from evals.rows.task import Task

BUDGETS = 512, 1024
DEFAULTS: dict[str, Any] = {
    "windows": 4,  # which differ more than methods do
    "strategies": (
        "transformers:dynamic",
        *(
            name.format(n=n, window=n - 4)
            for n in BUDGETS
            for name in (
                "expected(budget={n})",
                "snapkv(budget={n}, window=64)",
                "h2o(budget={n})",
                "sinks(sinks=4, window={window})",
            )
        ),
    ),
}
NEEDS = {"model", "text"}


def tasks(session: Session) -> Iterator[Task]:
    """Yield a task per contender, and the controls of `drift`."""
    return drift.of_windows(session, "stream")


def tables(config: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Return a table over all positions, and KL and top-1 by position."""
    return [*drift.tables(config, rows), drift.by_range(rows, "top1", "top-1 by position ↑")]
