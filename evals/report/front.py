"""One picture: what a number weighs against how far the cache drifts, and the front.

Plain SVG, with text as text: readable on a light and on a dark page, the same for the same rows.
"""

from __future__ import annotations

from math import ceil, floor, log10
from typing import TYPE_CHECKING, NamedTuple
from xml.sax.saxutils import escape

from evals.report.headline import KL_FLOOR
from evals.report.summary import decimal

if TYPE_CHECKING:
    from evals.rows.schema import Row

SHOWN = {"bits", "kl"}
WIDTH, HEIGHT = 860, 520
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 20, 70  # between the edges and the axes
LETTER, LINE, MARK = 6.6, 13, 6  # of a label, about; half a mark
# whatever the page is, the picture has its own ground
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2328 } .small { font-size: 10px }
.page { fill: #ffffff } .grid { stroke: #d1d9e0 } .front { stroke: #59636e; fill: none }
.ours { fill: #0969da } .theirs { fill: none; stroke: #bc4c00; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .page { fill: #0d1117 } .grid { stroke: #3d444d }
  .front { stroke: #9198a1 } .ours { fill: #4493f8 } .theirs { stroke: #f0883e }
}"""

Box = tuple[float, float, float, float]  # left, top, right, bottom


class Mark(NamedTuple):
    """A strategy: bits held per number, and KL to the exact cache."""

    bits: float
    kl: float
    name: str


def draw(rows: list[Row], caption: str) -> str | None:
    """Return the picture, with a mark for every strategy that has bits and KL; none if no cache
    drifts: circles of ours, diamonds of others, and a line along the front.
    """
    marks = sorted(_marks(rows))
    if not marks:
        return None
    low = floor(log10(min(mark.kl for mark in marks)))
    high = max(low + 1, ceil(log10(max(mark.kl for mark in marks))))
    widest = int(marks[-1].bits) + 1

    def place(bits: float, kl: float) -> tuple[float, float]:
        right, up = bits / widest, (log10(kl) - low) / (high - low)
        x = LEFT + (WIDTH - LEFT - RIGHT) * right
        return x, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * up

    parts = [f"<style>{STYLE}\n</style>"]
    parts.append(f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>')
    for bits in range(widest + 1):
        (x, bottom), (_, top) = place(bits, 10.0**low), place(bits, 10.0**high)
        parts += [_line((x, bottom), (x, top)), _text(x, bottom + 18, str(bits), "middle")]
    for power in range(low, high + 1):
        (left, y), (right, _) = place(0, 10.0**power), place(widest, 10.0**power)
        parts += [_line((left, y), (right, y)), _text(left - 8, y + 4, decimal(10.0**power), "end")]
    parts.append(_text(WIDTH / 2, HEIGHT - 32, "bits held per number (left is better)", "middle"))
    parts.append(_text(LEFT + 6, TOP + 15, "KL to the exact cache, nat (down is better)", "start"))
    parts.append(_text(WIDTH / 2, HEIGHT - 10, caption, "middle", "small"))
    points = " ".join("{:.1f},{:.1f}".format(*place(*one)) for one in front(_pairs(marks)))
    parts.append(f'<polyline class="front" points="{points}"/>')
    places = [place(mark.bits, mark.kl) for mark in marks]
    taken: list[Box] = [(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in places]
    for mark, (x, y) in zip(marks, places, strict=True):
        label = _beside(mark.name, x, y, taken)
        taken.append(label)
        parts += [_shape(mark.name, x, y), _text(label[0], label[3] - 3, mark.name, "start")]
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{body}\n</svg>\n'


def front(marks: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the marks (bits, KL) that no other beats in both, the lightest first.

    >>> front([(4, 0.1), (8, 0.01), (5, 0.2), (4, 0.3)])
    [(4, 0.1), (8, 0.01)]
    """
    best: list[tuple[float, float]] = []
    for mark in sorted(marks):
        if not best or mark[1] < best[-1][1]:
            best.append(mark)
    return best


def _marks(rows: list[Row]) -> list[Mark]:
    """Return the strategies that have bits and drift."""
    figures: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["metric"] in SHOWN and row["value"] is not None and not row["case"]:
            figures.setdefault(row["strategy"], {})[row["metric"]] = row["value"]
    whole = {name: f for name, f in figures.items() if f.keys() == SHOWN and f["kl"] > KL_FLOOR}
    return [Mark(f["bits"], f["kl"], name) for name, f in whole.items()]


def _pairs(marks: list[Mark]) -> list[tuple[float, float]]:
    return [(mark.bits, mark.kl) for mark in marks]


def _beside(name: str, x: float, y: float, taken: list[Box]) -> Box:
    """Return where a mark's label covers least of what is there, and lies within the axes."""
    wide, off = LETTER * len(name), MARK + 3

    def box(side: int, down: int) -> Box:
        start = x + off if side > 0 else x - off - wide
        return start, y + down - LINE / 2, start + wide, y + down + LINE / 2

    def covered(one: Box) -> float:
        outside = max(0.0, one[2] - WIDTH) + max(0.0, LEFT - one[0])
        return LINE * outside + sum(
            max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
            * max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
            for other in taken
        )

    return min((box(side, down) for down in (0, -10, 10, -20, 20) for side in (1, -1)), key=covered)


def _shape(name: str, x: float, y: float) -> str:
    if ":" not in name or name.startswith("kvplug:"):
        return f'<circle class="ours" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
    corners = (x, y - MARK), (x + MARK, y), (x, y + MARK), (x - MARK, y)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
    return f'<polygon class="theirs" points="{points}"/>'


def _line(start: tuple[float, float], end: tuple[float, float]) -> str:
    ends = f'x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"'
    return f'<line class="grid" {ends}/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "label") -> str:
    place = f'class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {place}>{escape(text)}</text>"
