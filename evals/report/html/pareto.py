"""What a cache weighs against how far it drifts; the larger the mark, the faster."""

from __future__ import annotations

from math import log10
from typing import TYPE_CHECKING, Any

import altair as alt

from evals.report.headline import KL_FLOOR, headline
from evals.report.html.chart import SEEN, Chart, color, data, decades, finish, record, shape
from evals.report.runs import where
from evals.report.summary import ABOUT, decimal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evals.report.runs import Run

NEAR = (0.15, 0.35)  # share of the width, decades: marks this close share one label
LINE = 14  # pixels
SHOWN = ("bytes_held", "kl", "decode")


def pareto(runs: list[Run], names: list[str], key: str) -> Chart | None:
    """Return the picture of runs that belong together, if they have bytes, drift and speed."""
    found = [headline(runs, metric) for metric in SHOWN]
    if not all(found):
        return None
    marks = [
        _mark(*(one.rows[name] for one in found))
        for name in names
        if all(name in one.rows for one in found)
    ]
    at = "; ".join(
        f"{ABOUT[name]} from {one.run.title}, {where(one.exact)}"
        for name, one in zip(SHOWN, found, strict=True)
    )
    caption = (
        f"Toward the lower left is better; the area of a mark is its decode speed. {at}. "
        f"A KL up to {KL_FLOOR:g} nat is drawn on the line “exact”."
    )
    title = "Bytes held, drift and speed"
    metrics = [(one.run.number, name) for one, name in zip(found, SHOWN, strict=True)]
    return Chart(key, title, caption, _spec(marks, names, title), metrics)


def _mark(held: dict, kl: dict, decode: dict) -> dict[str, Any]:
    return record(
        kl,
        mb=held["value"] / 1e6,
        drift=max(kl["value"], KL_FLOOR),
        speed=1000 / decode["value"],
        held=f"{held['value'] / 1e6:.1f} MB",
        kl=f"{decimal(kl['value'])} nat",
        decode=f"{decode['value']:.1f} ms/token",
    )


def _spec(marks: list[dict], names: list[str], about: str) -> dict[str, Any]:
    right = 1.4 * max(mark["mb"] for mark in marks)
    top = max(0.1, *(4 * mark["drift"] for mark in marks))
    x = alt.X(
        "mb:Q",
        title="bytes held, MB ← lower is better",
        scale=alt.Scale(domain=[0, right], nice=False),
    )
    y = alt.Y(
        "drift:Q",
        title="KL to the exact cache, nat ↓ lower is better",
        scale=alt.Scale(type="log", domain=[KL_FLOOR / 4, top], nice=False),
        axis=decades(KL_FLOOR, top),
    )
    size = alt.Size(
        "speed:Q",
        title="decode, steps/s ↑ higher is better",
        scale=alt.Scale(range=[0, 900], domainMin=0),
        legend=alt.Legend(orient="bottom", titleLimit=300, values=_ticks(marks), format=".2~g"),
    )
    order = alt.Order("speed:Q", sort="descending")  # the small ones on top
    dots = (
        alt.Chart(data(marks))
        .mark_point(filled=True)
        .encode(x=x, y=y, size=size, order=order, color=color(names), shape=shape(names))
        .encode(opacity=SEEN, tooltip=["strategy:N", "held:N", "kl:N", "decode:N"], href="href:N")
    )
    line = alt.Chart(data([{"drift": KL_FLOOR}])).mark_rule(strokeDash=[3, 3]).encode(y=y)
    exact = (
        alt.Chart(data([{"drift": KL_FLOOR, "text": "exact"}]))
        .mark_text(align="left", baseline="top", dx=4, dy=3)
        .encode(y=y, x=alt.value(0), text="text:N")
    )
    layers = [line, exact, dots, *_labels(marks, right, x, y)]
    return finish(alt.layer(*layers), about, height=380)


def _ticks(marks: list[dict]) -> list[float]:
    speeds = sorted({float(f"{mark['speed']:.2g}") for mark in marks})
    return sorted({speeds[0], speeds[len(speeds) // 2], speeds[-1]})


def _labels(marks: list[dict], right: float, x: alt.X, y: alt.Y) -> Iterator[alt.Chart]:
    """Yield the names beside the marks, on the side that has room and above the line "exact"."""
    for group in _groups(marks, right):
        onward = group["left"] < 0.5 * right
        lines, raised = len(group["text"]), group["drift"] <= KL_FLOOR
        label = alt.Chart(data([group | {"mb": group["right" if onward else "left"]}])).mark_text(
            align="left" if onward else "right",
            dx=17 if onward else -17,
            dy=-LINE * (lines - 1) / (1 if raised else 2) - 6 * raised,
            baseline="middle",
            fontSize=11,
            lineHeight=LINE,
        )
        yield label.encode(x=x, y=y, text="text:N")


def _groups(marks: list[dict], right: float) -> list[dict[str, Any]]:
    """Return a label per mark, or one where several coincide."""
    groups: list[dict[str, Any]] = []
    for mark in marks:
        for group in groups:
            wide = max(mark["mb"] - group["left"], group["right"] - mark["mb"]) / right
            high = abs(log10(group["drift"] / mark["drift"]))
            if wide < NEAR[0] and high < NEAR[1]:
                group["text"].append(mark["strategy"])
                group["left"] = min(group["left"], mark["mb"])
                group["right"] = max(group["right"], mark["mb"])
                break
        else:
            text = [mark["strategy"]]
            groups.append(
                {"left": mark["mb"], "right": mark["mb"], "drift": mark["drift"], "text": text}
            )
    return groups
