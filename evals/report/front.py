"""One picture: what a number weighs against how far the cache drifts, and the front."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from evals.report.headline import KL_FLOOR

if TYPE_CHECKING:
    from evals.rows.schema import Row

SHOWN = {"bits", "kl"}


def draw(rows: list[Row], caption: str) -> bytes | None:
    """Return a PNG with a mark for every strategy that has bits and KL, if any drifts."""
    figures: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["metric"] in SHOWN and row["value"] is not None and not row["case"]:
            figures.setdefault(row["strategy"], {})[row["metric"]] = row["value"]
    marks = {
        name: (f["bits"], f["kl"])
        for name, f in figures.items()
        if f.keys() == SHOWN and f["kl"] > KL_FLOOR
    }
    if not marks:
        return None
    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*front(list(marks.values())), strict=True), color="grey", linewidth=0.8)
    for name, (bits, kl) in marks.items():
        theirs = ":" in name and not name.startswith("kvplug:")
        axes.scatter(
            bits,
            kl,
            s=45,
            marker="D" if theirs else "o",
            facecolor="white" if theirs else "C0",
            edgecolor="black",
            linewidth=0.7,
            zorder=2,
        )
        axes.annotate(name, (bits, kl), (5, 3), textcoords="offset points", fontsize=7)
    axes.set_yscale("log")
    axes.set_xlim(0, 1.12 * max(bits for bits, _ in marks.values()))
    axes.set_xlabel("bits held per number (left is better)")
    axes.set_ylabel("KL to the exact cache, nat (down is better)")
    axes.set_title("Bits against drift; diamonds: caches from elsewhere", fontsize=11)
    axes.grid(which="major", linewidth=0.3)
    figure.supxlabel(caption, fontsize=6)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def front(marks: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the marks (bits, KL) that no other beats in both, the lightest first.

    >>> front([(4, 0.1), (8, 0.01), (5, 0.2), (4, 0.3)])
    [(4, 0.1), (8, 0.01)]
    """
    best: list[tuple[float, float]] = []
    for mark in sorted(marks):
        if not best or mark[1] < best[-1][1]:
            best.append(mark)
    return best
