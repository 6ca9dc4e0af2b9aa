"""What each width would cost in each layer, measured once.

An error d of what is stored moves predictions by KL = d' F d / 2, with F the Fisher information:
the mean of g g' over what the model might say next, g the gradient of its log-probability. Text is
fed in chunks, as a cache is: for each token of a chunk one answer is drawn, a backward pass gives g
of all that was stored before, and d is what the codec does to it at each width (cf. SqueezeLLM,
arXiv:2306.07629, which does so for weights). All chunks of a text take as long as one backward pass
over it, whose g would be ten times as large: mostly that of neighbours, which a tail keeps exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import transformers

from ..compat import cache_argument
from ..errors import SpecError
from .rotated import Rotated
from .widths import BITS, SECTION

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

CHUNK = 256  # tokens that read together what is stored


def measure(model: PreTrainedModel, windows: Tensor) -> dict[str, Tensor]:
    """What `widths.assign` wants to know, of a calibration's section.

    Args:
        model: of transformers.
        windows: [W, N] tokens, each a text of its own.

    Returns:
        kl [L, 2, len(BITS)] float32: KL in nat per token that keys (0) or values (1) of a layer at
            so many bits add, rounded plainly; NaN of a layer that stores none, or too few to fill a
            block.
        numbers [L, 2] int64: in a token's key and value; 0 of such a layer.
    """
    codecs = [Rotated(k_bits=bits, v_bits=bits) for bits in BITS]
    draw = torch.Generator().manual_seed(0)
    kl: dict[tuple[int, int], Tensor] = {}
    numbers: dict[tuple[int, int], int] = {}
    read = windows[:, CHUNK:].numel()
    for window in windows:
        cache = transformers.DynamicCache(config=model.config)
        for chunk in window.split(CHUNK):
            stored, gradients = _read(model, cache, chunk, draw)
            for place, x in stored.items():
                cost = _costs(x, gradients[place], place[1], codecs)
                if cost is not None:
                    kl[place] = kl.get(place, 0) + cost / read
                    numbers[place] = x.shape[1] * x.shape[-1]
    if not kl:
        raise SpecError(
            f"windows of {windows.shape[-1]} tokens store no block of {codecs[0]}: take longer ones"
        )
    layers = len(cache.layers)
    told = torch.full((layers, 2, len(BITS)), torch.nan)
    counts = torch.zeros(layers, 2, dtype=torch.int64)
    for place, cost in kl.items():
        told[place], counts[place] = cost, numbers[place]
    return {f"{SECTION}.kl": told, f"{SECTION}.numbers": counts}


def _read(
    model: PreTrainedModel, cache: transformers.Cache, chunk: Tensor, draw: torch.Generator
) -> tuple[dict[tuple[int, int], Tensor], dict[tuple[int, int], Tensor | None]]:
    """What a cache held before it was given a chunk [S], [1, H, T, D] by layer and side, and g of
    it, summed over the chunk; None of what the chunk did not read.
    """
    stored = {}
    for i, layer in enumerate(cache.layers):
        if getattr(layer, "keys", None) is not None:
            layer.keys, layer.values = (x.detach() for x in (layer.keys, layer.values))
            stored[i, 0], stored[i, 1] = layer.keys, layer.values
    for x in stored.values():
        x.requires_grad_()
    with torch.enable_grad():
        logits = model(input_ids=chunk[None], use_cache=True, **cache_argument(cache)).logits[0]
        says = logits.float().log_softmax(-1)  # [S, V]
        drawn = torch.multinomial(says.detach().exp().cpu(), 1, generator=draw)
        total = says.gather(1, drawn.to(says.device)).sum()
    if not stored:
        return {}, {}
    found = torch.autograd.grad(total, list(stored.values()), allow_unused=True)
    return stored, dict(zip(stored, found, strict=True))


def _costs(x: Tensor, g: Tensor | None, side: int, codecs: list[Rotated]) -> Tensor | None:
    """KL [len(BITS)] of storing x [1, H, T, D] at each width, summed over those who read it."""
    codec = codecs[0]
    tokens = (x.shape[2] - codec.first - codec.tail) // codec.block * codec.block
    if tokens <= 0 or g is None:
        return None
    whole = slice(codec.first, codec.first + tokens)
    x, g = (y[:, :, whole].unflatten(2, (-1, codec.block)).detach().float() for y in (x, g))
    costs, head = [], {"dim": (2, 3, 4), "keepdim": True}
    for codec in codecs:
        error = codec.decode_side(codec.encode_side(x, side), side) - x
        # at few bits what is stored is shorter than what came, in all tokens of a head alike: that
        # adds up; what else is lost by tokens and heads is independent: their products are noise
        alike = (error * x).sum(**head) / x.square().sum(**head).clamp_min(1e-30) * x
        parts = (g * (error - alike)).sum(-1), (g * alike).sum(**head)
        costs.append(sum(part.double().square().sum() for part in parts) / 2)
    return torch.stack(costs).float().cpu()
