"""The charts of a report, in the sections a reader looks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from evals.report.headline import sources
from evals.report.html.by_position import by_position
from evals.report.html.heat_map import heat_maps
from evals.report.html.over_context import over_context
from evals.report.html.pareto import pareto
from evals.report.runs import together

if TYPE_CHECKING:
    from evals.report.html.chart import Chart
    from evals.report.runs import Run


SYMBOLS = {
    "circle": "●",
    "square": "■",
    "triangle-up": "▲",
    "diamond": "◆",
    "cross": "✚",
    "triangle-down": "▼",
    "triangle-right": "▶",
}
COLORS = 7  # beside the reference's


class Look(NamedTuple):
    """How a strategy looks in every chart: a color of the style sheet and a form."""

    strategy: str
    color: int
    symbol: str
    glyph: str


def looks(names: list[str]) -> list[Look]:
    """Return a look per strategy; the first has a color of its own, and no two are alike in both.

    >>> [(look.color, look.symbol) for look in looks(list("abcdefghi"))][1::7]
    [(1, 'square'), (1, 'triangle-up')]
    """
    made = []
    for number, name in enumerate(names):
        turn, color = divmod(number - 1, COLORS)
        symbol = list(SYMBOLS)[(number + max(turn, 0)) % len(SYMBOLS)]
        made.append(Look(name, color + 1 if number else 0, symbol, SYMBOLS[symbol]))
    return made


class Section(NamedTuple):
    """Charts under one heading."""

    key: str
    title: str
    charts: list[Chart]


def sections(runs: list[Run], names: list[str]) -> list[Section]:
    """Return the sections that have a chart."""
    over = {
        "speed": ("decode", "prefill", "generate", "attention"),
        "memory": ("bytes_held", "peak_decode"),
    }
    charts = {
        key: [
            chart
            for metric in metrics
            for run in sources(runs, metric)
            for chart in over_context(run, metric, names)
        ]
        for key, metrics in over.items()
    }
    weighed = [pareto(group, names, f"pareto{i}") for i, group in enumerate(together(runs))]
    made = [
        Section("pareto", "What a smaller cache costs", [c for c in weighed if c]),
        Section("speed", "Speed", charts["speed"]),
        Section("memory", "Memory", charts["memory"]),
        Section("drift", "Drift by position", [c for r in runs if (c := by_position(r, names))]),
        Section("retrieval", "Retrieval", [c for run in runs for c in heat_maps(run)]),
    ]
    return [section for section in made if section.charts]
