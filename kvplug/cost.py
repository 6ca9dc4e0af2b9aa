"""What strategies cost, in words: bits held per number and drift, as they were measured.

Other models drift otherwise than the one of `source`: the order of codecs carries over better than
numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .measured import front

if TYPE_CHECKING:
    from .strategy import Strategy


def cost(strategy: Strategy) -> str:
    """Bits held per number and KL to the exact cache, of what was measured just so."""
    if strategy.retention.drops or strategy.by_layer:
        return "not measured"
    if strategy.lossless:
        return "loses nothing"
    name = str(strategy.codec)
    if name not in front()["bits"]:
        return "not measured"
    return f"{front()['bits'][name]:.2f} bits, KL {front()['kl'][name]:.5f}"


def source() -> str:
    """What the figures mean, and on what they were measured."""
    where = front()["measured"]
    model, text = (where[x].partition(" sha256:")[0] for x in ("model", "dataset"))
    return (
        f"bits: per number of {where['context']:,} tokens, 16 where not encoded; KL to the exact "
        f"cache in nat per token: {model} on {text}"
    )
