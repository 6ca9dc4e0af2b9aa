"""Runs as one HTML page."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from evals import suites
from evals.report.caveats import CONTROLS, caveats
from evals.report.html.sections import looks, sections
from evals.report.runs import short, subject, together
from evals.report.summary import summaries
from evals.rows.schema import METRICS, label
from evals.rows.tables import ARROWS, Table

if TYPE_CHECKING:
    from evals.report.runs import Run
    from evals.rows.schema import Row

HERE = Path(__file__).parent
# Nothing is fetched, and no script runs but the page's own.
POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {scripts}; "
    "base-uri 'none'; form-action 'none'"
)


class Group(NamedTuple):
    """The rows of one metric of one run; of no metric, those that failed."""

    key: str
    title: str
    doc: str
    rows: list[Row]


class Part(NamedTuple):
    """What the page shows of one run."""

    run: Run
    tables: list[Table]
    groups: list[Group]
    facts: dict[str, dict[str, str]]  # heading: name: value


def page(runs: list[Run]) -> str:
    """Return the whole page."""
    names = [
        name
        for name in dict.fromkeys(row["strategy"] for run in runs for row in run.rows)
        if name not in CONTROLS
    ]
    scripts = [Markup(_library()), Markup(_text("page.js"))]
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title="KV caches: " + "; ".join(dict.fromkeys(map(_model, runs))),
            policy=POLICY.format(scripts=" ".join(map(_digest, scripts))),
            style=Markup(_text("style.css")),
            scripts=scripts,
            subjects=[subject(group) for group in together(runs)],
            summaries=summaries(runs),
            caveats=caveats(runs),
            looks=looks(names),
            sections=sections(runs, names),
            parts=[_part(run) for run in runs],
        )
    )


def _model(run: Run) -> str:
    return short(run.env["model"]) or "attention alone"


def _part(run: Run) -> Part:
    tables = suites.get(run.suite).tables(run.config, run.rows) if run.rows else []
    return Part(run, [*tables, *_worst(run)], _groups(run), _facts(run))


def _worst(run: Run) -> list[Table]:
    """Return what only the whole answers of the kv_drift metric say, where there are any."""
    body = [
        [name, f"{answer['kl_p99']:.6f}", f"{answer['positions']:,}"]
        for name, answer in run.drift.items()
    ]
    head = ["strategy", "KL, 99th percentile, nat ↓", "positions"]
    return [Table("KL of the worst positions", head, body, [])] if body else []


def _groups(run: Run) -> list[Group]:
    rows: dict[str | None, list[Row]] = {}
    for row in run.rows:
        rows.setdefault(row["metric"], []).append(row)
    return [_group(run, metric, own) for metric, own in rows.items()]


def _group(run: Run, metric: str | None, rows: list[Row]) -> Group:
    if metric is None:
        return Group(f"m{run.number}-failed", "failed", "what stopped them", rows)
    first, what = rows[0], METRICS.get(metric)
    title = f"{metric}, {first['unit']} {ARROWS[first['better']]}"
    return Group(f"m{run.number}-{metric}", title, what.doc if what else "", rows)


def _facts(run: Run) -> dict[str, dict[str, str]]:
    times = sorted(row["time"] for row in run.rows)
    measured = {"suite": run.suite, "key": run.key, "rows": str(len(run.rows))}
    if times:
        measured |= {"first row": times[0], "last row": times[-1]}
    env = {name: value for name, value in run.env.items() if name != "versions"}
    return {
        "measured": measured,
        "config": _said(run.config),
        "environment": _said(env),
        "versions": _said(run.env["versions"]),
    }


def _said(values: dict[str, Any]) -> dict[str, str]:
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in values.items()
    }


@cache
def _library() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script."""
    script = vl_convert.javascript_bundle()
    if "</script" in script.lower():
        raise RuntimeError("the chart library cannot be put into a page: it has a closing tag")
    return "{" + script.replace("\r\n", "\n") + "}"  # a block: its names stay its own


@cache
def _text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["plain"] = lambda value: "" if value is None else f"{value:.6g}"
    made.filters["label"] = label
    return made
