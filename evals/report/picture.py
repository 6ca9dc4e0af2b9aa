"""One picture: what a cache weighs against how far it drifts, the larger the mark the faster."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from evals.report.headline import KL_FLOOR

if TYPE_CHECKING:
    from evals.rows.schema import Row

AREA = 700  # of the fastest strategy's mark, in points squared


def draw(rows: list[Row], caption: str) -> bytes | None:
    """Return a PNG with a mark for every strategy that has bytes, KL and decode speed, if any, from
    the suite that measures all three at one place.
    """
    figures: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["value"] is not None and row["suite"] == "quick":
            figures.setdefault(row["strategy"], {})[row["metric"]] = row["value"]
    whole = {name: f for name, f in figures.items() if {"bytes_held", "kl", "decode"} <= f.keys()}
    if not whole:
        return None
    fastest = min(f["decode"] for f in whole.values())

    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    handles = []
    for number, (name, f) in enumerate(whole.items()):
        mark = axes.scatter(
            f["bytes_held"] / 1e6,
            max(f["kl"], KL_FLOOR),
            s=AREA * fastest / f["decode"],  # proportional to tokens per second
            marker="D" if ":" in name and not name.startswith("kvplug:") else "o",
            facecolor=f"C{number % 10}",
            edgecolor="black",
            linewidth=0.6,
            alpha=0.8,
            zorder=2 + f["decode"] / fastest,  # the small ones on top: lossless caches coincide
            label=f"{name}, {1000 / f['decode']:.1f} steps/s",
        )
        handles.append(mark)
    axes.set_yscale("log")
    axes.set_ylim(KL_FLOOR / 4, max([0.1, *(4 * f["kl"] for f in whole.values())]))
    axes.set_xlim(0, 1.15 * max([1.0, *(f["bytes_held"] / 1e6 for f in whole.values())]))
    axes.axhline(KL_FLOOR, color="grey", linewidth=0.6, linestyle=":")
    where = axes.get_yaxis_transform()
    axes.text(0.01, KL_FLOOR, "exact", transform=where, va="bottom", color="grey", fontsize=8)
    axes.set_xlabel("bytes held by the cache, MB (left is better)")
    axes.set_ylabel("KL to the exact cache, nat (down is better)")
    axes.set_title("Bytes held against drift; area: decode speed; diamonds: rivals", fontsize=11)
    legend = figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    for handle in legend.legend_handles:
        handle.set_sizes([60])
    figure.supxlabel(caption, fontsize=6)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
