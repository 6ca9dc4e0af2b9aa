"""Runs as one file: a page for people, a tidy table of all rows for other programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pandas as pd

from evals.report.html.page import page
from evals.rows.schema import Row, label

if TYPE_CHECKING:
    from pathlib import Path

    from evals.report.runs import Run

PRINTED = ("suite", "strategy", "metric", "unit", "batch", "context", "case")
FIGURES = ("value", "p20", "p80", "n")


def frame(runs: list[Run]) -> pd.DataFrame:
    """Return a line per row, a column per key; what is nested as text."""
    rows = [
        row | {"case": label(row["case"]), "stats": row["stats"] and json.dumps(row["stats"])}
        for run in runs
        for row in run.rows
    ]
    return pd.DataFrame(rows, columns=list(Row.__annotations__))


def csv(runs: list[Run], path: Path) -> None:
    """Write every key of every row."""
    frame(runs).to_csv(path, index=False, lineterminator="\n")


def parquet(runs: list[Run], path: Path) -> None:
    """Write the same as columns with types."""
    frame(runs).to_parquet(path, index=False)


def latex(runs: list[Run], path: Path) -> None:
    """Write a longtable of the figures (booktabs); what failed says so in place of its metric."""
    rows = frame(runs)
    rows["metric"] = rows["metric"].fillna(rows["status"])
    table = rows[[*PRINTED, *FIGURES]].to_latex(
        index=False, longtable=True, escape=True, na_rep="--", float_format="%.6g"
    )
    path.write_text(table, encoding="utf-8", newline="\n")


def html(runs: list[Run], path: Path) -> None:
    """Write one HTML report."""
    path.write_text(page(runs), encoding="utf-8", newline="\n")


WRITERS = {"html": html, "csv": csv, "latex": latex, "parquet": parquet}
