"""Rows as tables of text: what the terminal and table.md show."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from evals.rows.noise import TIMED
from evals.rows.schema import METRICS
from evals.setup.contenders import EXACT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from evals.rows.noise import Noise
    from evals.rows.schema import Row

ARROWS = {"lower": "↓", "higher": "↑", "zero": "→0"}


class Table(NamedTuple):
    """A table, and the lines that belong under it."""

    title: str
    head: list[str]
    body: list[list[str]]
    notes: list[str]


Show = "Callable[[Row, Row | None], str]"  # a row, and the reference's of the same metric


def number(digits: int, sign: str = "") -> Show:
    """Return a formatter for plain figures; rounded first, so that there is no -0.00."""
    return lambda row, exact: f"{round(row['value'], digits) + 0.0:{sign}.{digits}f}"


def mb(row: Row, exact: Row | None) -> str:
    """Megabytes, and how many times the exact cache's."""
    times = f" ({row['value'] / exact['value']:.2f}x)" if exact and exact["value"] else ""
    return f"{row['value'] / 1e6:.1f}{times}"


def spread(row: Row, exact: Row | None) -> str:
    """Median, and the 20th and 80th percentile."""
    return f"{row['value']:.1f} ({row['p20']:.1f}-{row['p80']:.1f})"


def share(row: Row, exact: Row | None) -> str:
    """A share of yes-or-no answers, and its interval."""
    low, high = interval(row["value"], row["n"])
    return f"{row['value']:.2f} ({low:.2f}-{high:.2f})"


def interval(p: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share p of n yes-or-no answers (Wilson, 1927).

    >>> [round(x, 3) for x in interval(0.5, 10)]
    [0.237, 0.763]
    """
    z = 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    low, high = (max(0.0, middle + side) / (1 + z * z / n) for side in (-half, half))
    return low, high


# How a metric is shown, and under which head.
COLUMNS: dict[str, tuple[str, Show]] = {
    "bits": ("bits", number(2)),
    "bits_further": ("bits, further", number(2)),
    "bytes_held": ("held, MB", mb),
    "tokens_held": ("tokens a head", number(0)),
    "bytes_per_token": ("held, B/token", number(0)),
    "bytes_estimated": ("estimated, MB", mb),
    "estimate_error": ("estimate off, %", number(2, "+")),
    "peak_prefill": ("peak prefill, MB", mb),
    "peak_decode": ("peak decode, MB", mb),
    "rss_prefill": ("process, prefill, MB", mb),
    "rss_decode": ("process, decode, MB", mb),
    "prefill": ("prefill, s", number(2)),
    "encode": ("added, ms (p20-p80)", spread),
    "encode_share": ("of prefill, %", number(1)),
    "encode_token": ("added, ms/token decoded", number(3)),
    "decode": ("decode, ms/token (p20-p80)", spread),
    "choosing_prefill": ("choosing, % of prefill (p20-p80)", spread),
    "choosing_decode": ("choosing, % of decode (p20-p80)", spread),
    "perplexity": ("perplexity", number(4)),
    "perplexity_delta": ("Δ perplexity, %", number(2, "+")),
    "kl": ("KL, nat", number(6)),
    "top1": ("top-1", number(4)),
    "kl_generated": ("KL, generated", number(6)),
    "retrieval_asked": ("words found, asked in the prompt", share),
    "retrieval": ("words found", share),
    "greedy": ("greedy, tokens", number(0)),
    "edit_distance": ("edit distance", number(3)),
    "exact_match": ("exact match", number(2)),
    "rouge1": ("ROUGE-1", number(3)),
    "rougeL": ("ROUGE-L", number(3)),
}


def by_strategy(title: str, rows: Iterable[Row], noise: Noise | None = None) -> Table:
    """Return a line per strategy and a column per metric, as far as there are any."""
    figures: dict[str, dict[str | None, Row]] = {}
    for row in rows:
        figures.setdefault(row["strategy"], {})[row["metric"]] = row
    exact = figures.get(EXACT, {})
    present = {metric for own in figures.values() for metric in own}
    columns = {key: how for key, how in COLUMNS.items() if key in present}
    heads = [f"{text} {ARROWS[METRICS[key].better]}" for key, (text, _) in columns.items()]
    body = []
    for name, own in figures.items():
        cells = [
            flagged(own.get(key), exact.get(key), show, noise) for key, (_, show) in columns.items()
        ]
        if None in own:
            cells = ["failed" if text == "-" else text for text in cells]
        body.append([name, *cells, *[kernels(own)] * ("decode" in present)])
    head = ["strategy", *heads, *["kernel"] * ("decode" in present)]
    return Table(title, head, body, noise.lines() if noise else [])


def by_size(rows: list[Row], note: str) -> list[Table]:
    """Return `by_strategy` of each batch and context, the note under the last."""
    cells = dict.fromkeys((row["batch"], row["context"]) for row in rows)
    made = [
        by_strategy(
            f"batch {batch}, context {context:,}",
            [row for row in rows if (row["batch"], row["context"]) == (batch, context)],
        )
        for batch, context in sorted(cells)
    ]
    if made:
        made[-1] = made[-1]._replace(notes=[note])
    return made


def grid(title: str, rows: Iterable[Row], cell: Callable[[dict[str, Row]], str]) -> Table:
    """Return a line per strategy and a column per context; `cell` shows the rows of one place."""
    figures: dict[str, dict[int, dict[str | None, Row]]] = {}
    contexts = set()
    for row in rows:
        contexts.add(row["context"])
        own = figures.setdefault(row["strategy"], {})
        own.setdefault(row["context"], {})[row["metric"]] = row
    columns = sorted(contexts)
    body = []
    for name, own in figures.items():
        cells = []
        for context in columns:
            found = own.get(context, {})
            cells.append("failed" if None in found else cell(found) if found else "-")
        body.append([name, *cells])
    return Table(title, ["strategy", *(f"{context:,}" for context in columns)], body, [])


def figure(found: dict[str, Row], metric: str, form: str) -> str:
    """Return one figure of a grid's cell, or a dash."""
    row = found.get(metric)
    return "-" if row is None or row["value"] is None else format(row["value"], form)


def timing(metric: str, form: str, noise: Noise) -> Callable[[dict[str, Row]], str]:
    """Return a cell that shows a time, how many times as fast as the reference, and a flag."""

    def cell(found: dict[str, Row]) -> str:
        text = figure(found, metric, form)
        ratio = found.get("speedup")
        if ratio is None or text == "-":
            return text
        flag = noise.flag(found[metric], ratio["value"])
        return f"{text} ({ratio['value']:.2f}x{flag})"

    return cell


def flagged(row: Row | None, exact: Row | None, show: Show, noise: Noise | None) -> str:
    """Return a figure as text: a dash where there is none, a flag where it says nothing."""
    if row is None or row["value"] is None:
        return "-"
    text = show(row, exact)
    if noise and exact and row["metric"] in TIMED:
        text += noise.flag(row, row["value"] / exact["value"])
    return text


def kernels(figures: dict[str | None, Row]) -> str:
    """Return which kernels the decode run used, and how often a compressed cache was made dense."""
    stats = (figures.get("decode") or {}).get("stats") or {}
    dense = sum((stats.get("materialised") or {}).values())
    parts = [*stats.get("kernels", {}), *([f"dense x{dense}"] if dense else [])]
    return ", ".join(parts) or "torch"


def notes(rows: Iterable[Row]) -> list[str]:
    """Return every note once."""
    return list(dict.fromkeys(row["note"] for row in rows if row["note"]))
