"""A metric over context: lines where there are several contexts, bars where there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt

from evals.report.html.chart import (
    SEEN,
    Chart,
    axis,
    color,
    dash,
    data,
    finish,
    record,
    shape,
    tips,
)
from evals.rows.schema import label

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evals.report.runs import Run
    from evals.rows.schema import Row

BAR = 26  # pixels per strategy
SCALE = {"B": (1e6, "MB")}  # shown in larger units


def over_context(run: Run, metric: str, names: list[str]) -> Iterator[Chart]:
    """Yield a chart per batch and case."""
    rows = [r for r in run.rows if r["metric"] == metric and r["value"] is not None]
    rows = [row for row in rows if row["strategy"] in names]  # controls are in the tables
    rows = [row for row in rows if row["context"]]  # the step without context is no point of it
    for place in dict.fromkeys(map(_place, rows)):
        mine = [row for row in rows if _place(row) == place]
        yield _chart(run, metric, mine, place, names)


def _chart(run: Run, metric: str, rows: list[Row], place: tuple, names: list[str]) -> Chart:
    batch, case = place
    contexts = sorted({row["context"] for row in rows})
    factor, unit = SCALE.get(rows[0]["unit"], (1, None))
    title = axis(metric).replace(f", {rows[0]['unit']} ", f", {unit or rows[0]['unit']} ")
    draw = _lines if len(contexts) > 1 else _bars
    at = f"batch {batch}" + (f", {case}" if case else "")
    at += f", {contexts[0]:,} tokens" if len(contexts) == 1 else ""
    head = f"{metric.replace('_', ' ')}, {at}"
    return Chart(
        f"c{run.number}-{metric}-{rows[0]['anchor']}",
        head,
        f"{run.title}. Bars span the 20th to the 80th percentile.",
        draw([_record(row, factor) for row in rows], title, contexts, names, head),
        [(run.number, metric)],
    )


def _place(row: Row) -> tuple:
    return row["batch"], label(row["case"])


def _record(row: Row, factor: float) -> dict[str, Any]:
    scaled = {
        key: None if row[key] is None else row[key] / factor for key in ("value", "p20", "p80")
    }
    return record(row, **scaled)


def _lines(
    records: list[dict], title: str, contexts: list[int], names: list[str], about: str
) -> dict:
    x = alt.X(
        "context:Q",
        title="context, tokens",
        axis=alt.Axis(values=contexts, format=",d", grid=False),
        scale=alt.Scale(zero=False, nice=False, padding=12),
    )
    base = alt.Chart(data(records)).encode(x=x, color=color(names), opacity=SEEN)
    y = alt.Y("value:Q", title=title, scale=alt.Scale(zero=True))
    line = base.mark_line(strokeWidth=2).encode(y=y, strokeDash=dash(names))
    spread = base.mark_rule(strokeWidth=1.5).encode(y=alt.Y("p20:Q", title=title), y2="p80:Q")
    point = base.mark_point(filled=True, size=70, opacity=1).encode(
        y=y, shape=shape(names), tooltip=tips("context:Q"), href="href:N"
    )
    return finish(line + spread + point, about)


def _bars(
    records: list[dict], title: str, contexts: list[int], names: list[str], about: str
) -> dict:
    own = [name for name in names if name in {record["strategy"] for record in records}]
    y = alt.Y("strategy:N", sort=own, title=None, axis=alt.Axis(labelLimit=150, grid=False))
    base = alt.Chart(data(records)).encode(y=y, opacity=SEEN)
    room = 1.2 * max(record["p80"] or record["value"] for record in records)  # for the labels
    bar = base.mark_bar(height={"band": 0.62}).encode(
        x=alt.X(
            "value:Q",
            axis=alt.Axis(title=title, titleAnchor="end"),
            scale=alt.Scale(domain=[0, room]),
        ),
        color=color(names),
        tooltip=tips("context:Q"),
        href="href:N",
    )
    spread = base.mark_rule(strokeWidth=2).encode(x="p20:Q", x2="p80:Q")
    label = base.mark_text(align="left", dx=5).encode(
        x="p80:Q", text=alt.Text("value:Q", format=".3~r")
    )
    return finish(bar + spread + label, about, height=BAR * len(own))
