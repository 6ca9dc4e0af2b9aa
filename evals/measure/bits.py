"""Bits that a cache holds per number it was given, as beside a model of 16-bit floats.

Bytes alone compare caches of one model in one dtype; bits per number compare codecs. They are
counted of what is held after a window went in, in chunks, as drift is measured: so the bits are
those of the very cache whose drift stands beside them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from evals.measure.clock import step
from evals.measure.memory import held_bytes

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from evals.setup.contenders import Contender

States = dict[int, tuple[torch.Tensor, torch.Tensor]]  # by layer, keys and values [1, H, N, D]


class Bits(NamedTuple):
    """Bits per number.

    held: all that is held of N tokens, over the numbers in their keys and values: codes, scales,
        and whatever tokens are in full precision just then, which count 16 bits a number
    further: what the second half of the N tokens added, over its numbers: the price of a long
        context, where a tail of fixed length no longer counts
    """

    held: float
    further: float


def exact_states(model: PreTrainedModel, exact: Contender, window: torch.Tensor) -> States:
    """Return what the exact cache holds of window [N], in bfloat16; a layer that slides holds the
    newest of its tokens, one of linear attention none.
    """
    cache = exact.build(model.config, len(window))
    step(model, cache, window[None])
    layers = enumerate(cache.layers)
    whole = {i: (x.keys, x.values) for i, x in layers if getattr(x, "keys", None) is not None}
    return {i: (k.bfloat16(), v.bfloat16()) for i, (k, v) in whole.items()}


@torch.no_grad()
def bits(model: PreTrainedModel, contender: Contender, states: States, chunk: int) -> Bits:
    """Feed a cache with states, so many tokens at a time, and count what it holds."""
    length = max(k.shape[2] for k, _ in states.values())
    cache = contender.build(model.config, length)
    half = length // 2 // chunk * chunk
    before = 0
    for start in range(0, length, chunk):
        if start == half:
            before = _bytes(cache)
        for layer, pair in states.items():
            new = [x[:, :, start : start + chunk].clone() for x in pair]
            if new[0].shape[2]:
                keys, values = cache.update(*new, layer)
                # whoever waits for attention before it encodes gets one
                scaled_dot_product_attention(new[0], keys, values)
    after = _bytes(cache)
    later = sum(x[:, :, half:].numel() for pair in states.values() for x in pair)
    whole = sum(x.numel() for pair in states.values() for x in pair)
    return Bits(8 * after / whole, 8 * (after - before) / later)


def _bytes(cache: Cache) -> int:
    """Count what is stored; of a cache of ours without the room that it keeps ready for more."""
    if not hasattr(cache, "state_dict"):
        return held_bytes(cache)
    return sum(x.nbytes for x in cache.state_dict().values() if isinstance(x, torch.Tensor))
