"""Rows of committed result folders, and how they are written in tables."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from evals.report.render import markdown
from evals.report.runs import Run, load
from evals.rows.tables import Table
from evals.setup.contenders import EXACT
from evals.suites import decode as decode_suite

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "docs" / "benchmarks"
REPORT = ROOT / "docs" / "reports" / "smollm2-135m"


@cache
def folders(*names: str) -> list[Run]:
    """Return the runs in folders of docs/benchmarks."""
    return load([BENCHMARKS / name for name in names])


@cache
def _reports() -> list[Run]:
    return load([REPORT])


def report(suite: str) -> Run:
    """Return the full report's run of a suite."""
    return next(run for run in _reports() if run.suite == suite)


def find(run: Run, strategy: str, metric: str, batch: int, context: int, case: str | None = None):
    """Return the row of a figure."""
    place = strategy, metric, batch, context, case
    names = "strategy", "metric", "batch", "context", "case"
    return next(row for row in run.rows if tuple(row[name] for name in names) == place)


def step(run: Run, strategy: str, batch: int, context: int) -> str:
    """Return milliseconds per token and times as fast as the exact cache, as text."""
    row = find(run, strategy, "decode", batch, context)
    if strategy == EXACT:
        return f"{row['value']:.1f}"
    ratio = find(run, strategy, "speedup", batch, context)["value"]
    return f"{row['value']:.1f} ({ratio:.2f}x{run.noise.flag(row, ratio)})"


def apart(run: Run) -> str:
    """Return how far the reference of a decode run is from itself."""
    notes = decode_suite.tables(run.config, run.rows)[-1].notes
    return f"{next(line for line in notes if 'A/A' in line).partition(';')[0]}."


def rendered(head: list[str], body: list[list[str]]) -> str:
    """Return a table in markdown."""
    return markdown([Table("", head, body, [])], {}, []).strip()
