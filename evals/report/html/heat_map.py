"""Retrieval heat maps: the share of needles found, by depth and length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt

from evals.report.html.chart import Chart, data, finish
from evals.report.retrieved import retrieved

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evals.report.retrieved import Cell
    from evals.report.runs import Run

ROW = 34  # pixels per depth


def heat_maps(run: Run) -> Iterator[Chart]:
    """Yield a map per strategy and number of keys."""
    cells = retrieved(run)
    for strategy, keys in dict.fromkeys((cell.strategy, cell.keys) for cell in cells):
        mine = [cell for cell in cells if (cell.strategy, cell.keys) == (strategy, keys)]
        title = f"{strategy}, {keys} key{'' if keys == 1 else 's'}"
        caption = (
            f"{run.title}. Share found ↑ higher is better, n {mine[0].n}; depth 0 is the start."
        )
        key = f"c{run.number}-heat-{mine[0].anchor}"
        yield Chart(key, title, caption, _spec(mine, title), [(run.number, "retrieval")])


def _spec(cells: list[Cell], about: str) -> dict[str, Any]:
    records = [_record(cell) for cell in cells]
    base = alt.Chart(data(records)).encode(
        x=alt.X("length:O", title="length, tokens", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("depth:O", title="depth"),
    )
    share = alt.Color("share:Q", scale=alt.Scale(domain=[0, 1], scheme="viridis"), legend=None)
    rect = base.mark_rect().encode(
        color=share,
        tooltip=[alt.Tooltip(field) for field in ("text:N", "length:O", "depth:O", "n:Q")],
        href="href:N",
    )
    text = base.mark_text(fontSize=12).encode(
        text="text:N",
        color=alt.condition("datum.share > 0.6", alt.value("black"), alt.value("white")),
    )
    return finish(rect + text, about, height=ROW * len({cell.depth for cell in cells}))


def _record(cell: Cell) -> dict[str, Any]:
    return {
        "length": cell.length,
        "depth": cell.depth,
        "share": cell.share,
        "text": f"{cell.share:.0%}",
        "n": cell.n,
        "href": f"#{cell.anchor}",
    }
