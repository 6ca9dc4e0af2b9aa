"""Two runs side by side: every figure both have, as a ratio, and whether noise would explain it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evals import suites
from evals.report.runs import read
from evals.rows.noise import INSIDE, TIMED, Noise
from evals.rows.schema import METRICS, label
from evals.rows.tables import ARROWS, Table

if TYPE_CHECKING:
    from pathlib import Path

    from evals.rows.schema import Row

Figure = tuple  # which one it is: strategy, metric, batch, context, case


def compare(before: Path, after: Path) -> Table:
    """Return a table of the figures that both runs have, with the second over the first.

    A time is inside the noise where its spread (p20 to p80) overlaps the other's, or where the
    ratio is no further from 1 than either run's A/A rows were.
    """
    (old, old_off), (new, new_off) = (_figures(folder) for folder in (before, after))
    body = []
    for place, row in new.items():
        if place not in old:
            continue
        was, metric = old[place], row["metric"]
        ratio = f"{row['value'] / was['value']:.3f}" if was["value"] else "-"
        off = max(old_off.at(was), new_off.at(row))
        flag = INSIDE if _inside(was, row, off) else ""
        name, _, batch, context, case = place
        head = f"{metric}, {row['unit']} {ARROWS[METRICS[metric].better]}"
        where = f"batch {batch}, context {context}{f', {case}' if case else ''}"
        body.append([name, head, where, f"{was['value']:.6g}", f"{row['value']:.6g}", ratio, flag])
    alone = len(old.keys() ^ new.keys())
    said = [
        f"{len(body)} figures are in both, {alone} in one only. {INSIDE}: equal, or a time whose "
        "difference is inside the noise."
    ]
    head = ["strategy", "figure", "where", before.name, after.name, "ratio", "noise"]
    return Table(f"{after} against {before}", head, body, said)


def _figures(folder: Path) -> tuple[dict[Figure, Row], Noise]:
    config, _, rows = read(folder)
    found = {
        (
            *(row[name] for name in ("strategy", "metric", "batch", "context")),
            label(row["case"]),
        ): row
        for row in rows
        if row["value"] is not None
    }
    return found, Noise(rows, suites.reference(config["suite"]))


def _inside(was: Row, now: Row, off: float) -> bool:
    if was["value"] == now["value"]:
        return True
    if now["metric"] not in (*TIMED, "speedup", "throughput", "floor_share"):
        return False  # bytes and drift do not depend on the machine's mood
    overlap = was["p20"] <= now["p80"] and now["p20"] <= was["p80"]
    spread = min(was["n"], now["n"]) > 1 and overlap
    return spread or abs(now["value"] / was["value"] - 1) <= off
