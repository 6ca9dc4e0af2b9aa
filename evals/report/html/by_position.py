"""Drift by position: whether a cache gets worse the longer the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import altair as alt

from evals.report.headline import KL_FLOOR
from evals.report.html.chart import (
    SEEN,
    Chart,
    axis,
    color,
    dash,
    data,
    decades,
    finish,
    record,
    shape,
    tips,
)

if TYPE_CHECKING:
    from evals.report.runs import Run


def by_position(run: Run, names: list[str]) -> Chart | None:
    """Return KL per range of positions, where a run has it."""
    found = [r for r in run.rows if r["metric"] == "kl" and r["value"] is not None]
    rows = [r for r in found if isinstance(r["case"], str)]  # a range; else another kind of case
    if not rows:
        return None
    cases = list(dict.fromkeys(row["case"] for row in rows))
    records = [record(r, case=r["case"], drift=max(r["value"], KL_FLOOR)) for r in rows]
    x = alt.X(
        "case:O", sort=cases, title="position in the window, tokens", axis=alt.Axis(labelAngle=0)
    )
    top = max(0.1, *(2 * one["drift"] for one in records))
    y = alt.Y(
        "drift:Q",
        title=axis("kl"),
        scale=alt.Scale(type="log", domain=[KL_FLOOR / 2, top], nice=False),
        axis=decades(KL_FLOOR, top),
    )
    base = alt.Chart(data(records)).encode(x=x, y=y, color=color(names), opacity=SEEN)
    line = base.mark_line(strokeWidth=2).encode(strokeDash=dash(names))
    point = base.mark_point(filled=True, size=70).encode(
        shape=shape(names), tooltip=tips("case:N"), href="href:N"
    )
    title = "KL by position"
    caption = f"{run.title}. A KL up to {KL_FLOOR:g} nat is drawn at {KL_FLOOR:g}."
    spec = finish(line + point, title)
    return Chart(f"c{run.number}-position", title, caption, spec, [(run.number, "kl")])
