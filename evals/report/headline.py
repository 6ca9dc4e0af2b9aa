"""One figure per strategy and metric: what a summary quotes, and where it was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from evals.report.runs import Run
    from evals.rows.schema import Row

# nat: a KL up to here is drawn on the line "exact", since a logarithm has no zero
KL_FLOOR = 1e-6
# The suite made for a metric comes first; "quick" has a bit of everything.
SOURCES = {
    "bytes_held": ("memory", "quick", "decode"),
    "peak_decode": ("memory", "quick"),
    "decode": ("decode", "quick"),
    "prefill": ("prefill", "quick"),
    "generate": ("use_cache",),
    "attention": ("kernel",),
    "kl": ("drift", "pareto", "quick"),
}


class Headline(NamedTuple):
    """The rows of one metric, all at one place of one run."""

    run: Run
    exact: Row  # the reference's
    rows: dict[str, Row]  # by strategy
    speedups: dict[str, Row]  # paired in the same loop, where the suite has them


def sources(runs: list[Run], metric: str) -> list[Run]:
    """Return the runs of the first suite that has a metric."""
    for suite in SOURCES[metric]:
        mine = [run for run in runs if run.suite == suite]
        if having := [run for run in mine if any(row["metric"] == metric for row in run.rows)]:
            return having
    return []


def headline(runs: list[Run], metric: str) -> Headline | None:
    """Return a metric where most strategies have it, at the smallest batch and longest context."""
    found = (_of(run, metric) for run in sources(runs, metric))
    return next((one for one in found if one), None)


def _of(run: Run, metric: str) -> Headline | None:
    places: dict[tuple[int, int], dict[str, dict[str, Row]]] = {}
    for row in run.rows:
        if row["value"] is not None and not row["case"]:
            here = places.setdefault((row["batch"], row["context"]), {})
            here.setdefault(row["metric"], {})[row["strategy"]] = row
    whole = {at: here for at, here in places.items() if run.reference in here.get(metric, ())}
    if not whole:
        return None
    best = max(whole, key=lambda at: (len(whole[at][metric]), -at[0], at[1]))
    rows = whole[best][metric]
    return Headline(run, rows[run.reference], rows, whole[best].get("speedup", {}))
