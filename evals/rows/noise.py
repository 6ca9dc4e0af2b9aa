"""How far a figure is from itself: the reference is measured twice, as two rows, in every run."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from evals.rows.schema import label
from evals.setup.contenders import EXACT
from evals.setup.control import SAME

if TYPE_CHECKING:
    from collections.abc import Iterable

    from evals.rows.schema import Row

INSIDE = "≈"  # no further from the reference than the reference from itself
TIMED = ("prefill", "first_token", "decode", "attention", "generate")


class Noise:
    """The A/A differences of a run, as shares: |second / first - 1| of every timed figure."""

    def __init__(self, rows: Iterable[Row], reference: str = EXACT) -> None:
        """Find the reference and its double in a run's rows."""
        pairs: dict[tuple, dict[str, float]] = {}
        for row in rows:
            if row["metric"] in TIMED and row["value"] and row["strategy"] in (reference, SAME):
                pairs.setdefault(_place(row), {})[row["strategy"]] = row["value"]
        self.off = {
            place: abs(pair[SAME] / pair[reference] - 1)
            for place, pair in pairs.items()
            if len(pair) == 2
        }

    def at(self, row: Row) -> float:
        """Return what a ratio to the reference must exceed there: its own noise, or the typical."""
        all_of_it = [off for place, off in self.off.items() if place[0] == row["metric"]]
        if not all_of_it:
            return 0.0
        return max(self.off.get(_place(row), 0.0), statistics.median(all_of_it))

    def flag(self, row: Row, ratio: float) -> str:
        """Return the mark of a ratio inside the noise; the two rows that make it have none."""
        if row["strategy"] == SAME or not self.off or ratio == 1:
            return ""
        return f" {INSIDE}" if abs(ratio - 1) <= self.at(row) else ""

    def lines(self) -> list[str]:
        """Return the line that says what the flag means."""
        told = []
        for metric in TIMED:
            if mine := [100 * off for place, off in self.off.items() if place[0] == metric]:
                most = f" (at most {max(mine):.1f} %)" if len(mine) > 1 else ""
                told.append(f"{metric} by {statistics.median(mine):.1f} %{most}")
        if not told:
            return []
        return [
            f"A/A: the reference measured twice ({SAME}) differs from itself in "
            f"{', in '.join(told)}; what is no further from it is marked {INSIDE}."
        ]


def _place(row: Row) -> tuple:
    return row["metric"], row["batch"], row["context"], label(row["case"])
