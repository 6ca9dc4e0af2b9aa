"""Strategies to test with, of the stages that come with kvplug: no list to forget a new one in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import SpecError
from ..registry import REGISTRIES
from ..spec import parse
from .pairs import pairwise

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BUILTIN = {kind: registry.builtin for kind, registry in REGISTRIES.items()}
# each retention so small that short sequences go beyond it
SMALL = {
    "full": "full",
    "window": "window(length=9)",
    "sinks": "sinks(sinks=2, window=10)",
    "snapkv": "snapkv(budget=16, every=5, window=4)",
    "expected": "expected(budget=12, every=5, queries=6, sinks=2, recent=3)",
    "keydiff": "keydiff(budget=12, every=1, recent=3)",
    "h2o": "h2o(budget=12, every=5)",
    "tova": "tova(budget=12, every=5)",
    "lagkv": "lagkv(budget=12, every=5, lag=4, sinks=2)",
    "pyramid": "pyramid(budget=12, every=5, window=4)",
}
BITS = {"int": ", k_bits=6, v_bits=3"}  # its defaults are those of a preset; these make planes
LONG = (  # 64 tokens lose none
    "full",
    "window(length=64)",
    "sinks(sinks=4, window=60)",
    "snapkv(budget=64, every=5, window=4)",
)
# methods that choose by content differ in what they score alone, presets of `int` in their widths
# alone: one of them stands for all, of presets one that rounds keys for queries and one that does
# not
PAIRED = BUILTIN | {
    "retention": ("full", "window", "sinks", "snapkv"),
    "codec": [x for x in BUILTIN["codec"] if x not in ("k8v4", "int3", "int2")],
}
STAGES: dict[str, Sequence[Any]] = {
    "retention": [SMALL[name] for name in PAIRED["retention"]],
    "layout": BUILTIN["layout"],
    "codec": PAIRED["codec"],
    "tail": (0, 8),
    "placement": BUILTIN["placement"],
}
PLAIN = {
    "retention": "full", "layout": "growing", "codec": "exact", "tail": 0, "placement": "device"
}  # fmt: skip
LOSSLESS = STAGES | {"retention": LONG, "codec": ("exact",)}
# what has a layer of its own kind: that takes more than two choices
KINDS = [
    {"retention": "full", "layout": layout, "codec": codec, "tail": tail, "placement": "device"}
    for layout, codec, tail in (
        ("growing", "exact", 0),
        ("static", "exact", 0),
        ("static", "int8", 0),
        ("static", "int4", 8),
    )
]


def spec(row: dict[str, Any]) -> str:
    """The strategy of a row of `STAGES`, with blocks of 8, as a user writes it."""
    stages = [x for x in (row["retention"], row["layout"], row["placement"]) if x != "device"]
    if row["codec"] != "exact" or row["placement"] != "device":
        bits = BITS.get(row["codec"], "")
        stages.append(f"{row['codec']}(block=8, tail={row['tail']}{bits})")
    return "+".join(x for x in stages if x != "full")


def composes(row: dict[str, Any]) -> bool:
    """Whether the stages of a row, or of a part of one, go together."""
    try:
        parse(spec(PLAIN | row))
    except SpecError:
        return False
    return True


def strategies() -> list[str]:
    """Each two stages together, each kind of layer, and long retention that loses nothing."""
    rows = pairwise(STAGES, composes, first=KINDS)
    rows += pairwise({"retention": LONG[1:], "layout": BUILTIN["layout"]}, composes)
    return list(dict.fromkeys(spec(PLAIN | row) for row in rows))


def cover(
    allowed: Callable[[dict[str, Any]], bool] = lambda row: True, **axes: Sequence
) -> list[tuple]:
    """Rows (spec, a value of each axis): each two choices meet, also where nothing may be lost."""

    def both(row: dict[str, Any]) -> bool:
        return composes(row) and allowed(row)

    rows = [x for stages in (LOSSLESS, STAGES) for x in pairwise(stages | axes, both)]
    return list(dict.fromkeys((spec(row), *(row[axis] for axis in axes)) for row in rows))
