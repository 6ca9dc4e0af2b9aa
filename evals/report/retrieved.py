"""Cells of the retrieval heat maps: what share of needles was found, by depth, length and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from evals.report.runs import Run

ASKED = ("length", "depth", "keys")  # of a row's case


class Cell(NamedTuple):
    """One row of the retrieval suite."""

    strategy: str
    length: float
    depth: float
    keys: float
    share: float
    n: int
    anchor: str

    @property
    def place(self) -> tuple[float, float, float]:
        """Which question was asked."""
        return self.length, self.depth, self.keys


def retrieved(run: Run) -> list[Cell]:
    """Return a run's cells; none where it asked nothing, or says one share of all it asked."""
    return [
        Cell(
            row["strategy"],
            *(row["case"][name] for name in ASKED),
            share=row["value"],
            n=row["n"],
            anchor=row["anchor"],
        )
        for row in run.rows
        if row["metric"] == "retrieval" and row["case"] and row["value"] is not None
    ]
