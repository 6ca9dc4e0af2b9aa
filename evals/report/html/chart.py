"""What every chart shares: one look per strategy, one floor for a KL of zero, links to rows."""

from __future__ import annotations

from math import ceil, log10
from typing import TYPE_CHECKING, Any, NamedTuple

import altair as alt

from evals.rows.schema import METRICS
from evals.rows.tables import ARROWS

if TYPE_CHECKING:
    from evals.rows.schema import Row

DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [12, 3])
HIDDEN = alt.param(name="hidden", value=[])  # strategies that the page's legend has switched off
SEEN = alt.condition("indexof(hidden, datum.strategy) < 0", alt.value(0.9), alt.value(0.08))
HEIGHT = 260


class Chart(NamedTuple):
    """A chart, the words around it, and the rows it shows: (run, metric) pairs."""

    key: str
    title: str
    caption: str
    spec: dict[str, Any]
    metrics: list[tuple[int, str]]


def axis(metric: str) -> str:
    """Return the title of an axis: metric, unit, and which way is better."""
    what = METRICS[metric]
    unit = "" if what.unit == "1" else f", {what.unit}"
    return f"{metric.replace('_', ' ')}{unit} {ARROWS[what.better]} {what.better} is better"


def record(row: Row, **more: Any) -> dict[str, Any]:
    """Return what a mark carries."""
    spread = "-" if row["p20"] is None else f"{row['p20']:.6g} to {row['p80']:.6g}"
    return {
        "strategy": row["strategy"],
        "batch": row["batch"],
        "context": row["context"],
        "value": row["value"],
        "p20": row["p20"],
        "p80": row["p80"],
        "n": row["n"],
        "figure": f"{row['value']:.6g} {'' if row['unit'] == '1' else row['unit']}",
        "spread": spread,
        "href": f"#{row['anchor']}",
        **more,
    }


def data(records: list[dict[str, Any]]) -> alt.Data:
    """Return records as the inline data of a chart."""
    return alt.Data(values=records)


def color(names: list[str]) -> alt.Color:
    """Return the channel that gives a strategy the same color in every chart."""
    return alt.Color("strategy:N", scale=alt.Scale(domain=names), legend=None)


def shape(names: list[str]) -> alt.Shape:
    """Return the same for the form of a mark, for those who do not see color."""
    return alt.Shape("strategy:N", scale=alt.Scale(domain=names), legend=None)


def dash(names: list[str]) -> alt.StrokeDash:
    """Return the same for lines."""
    marks = [DASHES[number % len(DASHES)] for number in range(len(names))]
    return alt.StrokeDash("strategy:N", scale=alt.Scale(domain=names, range=marks), legend=None)


def decades(low: float, high: float) -> alt.Axis:
    """Return a logarithmic axis that marks the powers of ten only."""
    powers = range(round(log10(low)), ceil(log10(high)) + 1)
    return alt.Axis(format="~g", values=[float(f"1e{power}") for power in powers])


def tips(*fields: str) -> list[alt.Tooltip]:
    """Return what is shown over a mark."""
    always = ("strategy:N", "figure:N", "spread:N", "n:Q")
    titles = {"spread": "p20 to p80", "n": "samples"}
    return [
        alt.Tooltip(field, title=titles.get(name := field.partition(":")[0], name))
        for field in (*always, *fields)
    ]


def finish(chart: alt.Chart | alt.LayerChart, description: str, height: Any = HEIGHT) -> dict:
    """Return a specification that fits its box and is no wider."""
    whole = chart.add_params(HIDDEN).properties(
        width="container",
        height=height,
        description=description,
        padding={"left": 5, "top": 5, "right": 12, "bottom": 5},
        autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
    )
    spec = whole.to_dict()
    spec.pop("$schema")  # an address; the page says which grammar it is
    return spec
