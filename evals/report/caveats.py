"""What a reader must know before believing figures: controls, failures, what was not checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from evals.report.runs import short
from evals.rows.noise import INSIDE, TIMED
from evals.setup import shapes
from evals.setup.control import LEAST_KL, MOST_KL, SAME, Broken, Plain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evals.report.runs import Run
    from evals.rows.schema import Row

CONTROLS = (Broken.name, Plain.name, SAME)  # in tables, not in charts or the summary
QUALITY = ("kl", "greedy", "retrieval")  # one of what suites say that depends on the weights
COMPARED = ("hardware", "threads", "git", "model", "dataset")  # of the environment


class Caveat(NamedTuple):
    """A warning; grave ones put the figures themselves in question."""

    grave: bool
    text: str
    anchor: str | None = None


def caveats(runs: list[Run]) -> list[Caveat]:
    """Return all warnings, grave ones first."""
    found = [caveat for run in runs for caveat in _of(run)] + list(_differences(runs))
    return sorted(found, key=lambda caveat: not caveat.grave)


def _of(run: Run) -> Iterator[Caveat]:
    if not run.rows:
        yield Caveat(False, f"{run.title}: nothing was measured yet.")
        return
    yield from _controls(run)
    yield from _failures(run)
    timed = {row["strategy"] for row in run.rows if row["metric"] in TIMED}
    if timed and SAME not in timed:
        yield Caveat(
            False,
            f"{run.title}: the reference was not measured twice, so the noise is unknown; "
            f"{INSIDE} marks speeds whose spread (p20 to p80) overlaps the reference's.",
        )
    senseless = (run.env["model"] or "").startswith(shapes.PREFIX)
    if senseless and any(row["metric"] in QUALITY for row in run.rows):
        yield Caveat(
            False,
            f"{run.title}: the model's weights are random: bytes and speed are those of its shape, "
            "drift and answers mean nothing.",
        )
    if (run.env["git"] or "").endswith("-dirty"):
        yield Caveat(False, f"{run.title}: measured with uncommitted changes ({run.env['git']}).")


def _controls(run: Run) -> Iterator[Caveat]:
    kl = {r["strategy"]: r for r in run.rows if r["metric"] == "kl" and not r["case"]}
    if not kl:
        return
    broken, exact = kl.get(Broken.name), kl.get(run.reference)
    failed = any(_is_failure(row) and row["strategy"] == Broken.name for row in run.rows)
    if broken is None and not failed:
        yield Caveat(False, f"{run.title}: no broken codec was measured, so drift is unchecked.")
    if broken and broken["value"] < LEAST_KL:
        text = f"the broken codec shows a KL of only {broken['value']:.2g}: drift is not seen here"
        yield Caveat(True, f"{run.title}: {text}.", broken["anchor"])
    if exact and exact["value"] > MOST_KL:
        text = f"the exact cache differs from itself by a KL of {exact['value']:.2g}"
        yield Caveat(True, f"{run.title}: {text}.", exact["anchor"])


def _failures(run: Run) -> Iterator[Caveat]:
    seen = set()
    for row in filter(_is_failure, run.rows):
        if (row["strategy"], row["error"]) not in seen:
            seen.add((row["strategy"], row["error"]))
            grave = row["strategy"] in CONTROLS
            text = f"{run.title}: {row['strategy']} failed: {row['error']}"
            yield Caveat(grave, text, row["anchor"])


def _differences(runs: list[Run]) -> Iterator[Caveat]:
    """Yield what is not the same in all runs."""
    for name in COMPARED:
        values = dict.fromkeys(run.env[name] for run in runs if run.env[name] is not None)
        if len(values) > 1:
            told = ", ".join(short(str(value)) for value in values)
            yield Caveat(False, f"The runs differ in {name}: {told}.")
    versions = {
        name: {run.env["versions"].get(name) for run in runs}
        for name in ("torch", "transformers", "kvplug")
    }
    for name, values in versions.items():
        if len(values) > 1:
            yield Caveat(
                False, f"The runs differ in {name}: {', '.join(sorted(map(str, values)))}."
            )


def _is_failure(row: Row) -> bool:
    return row["status"] == "failed"
