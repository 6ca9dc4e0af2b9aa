"""What the adapters of other people's quantizers share: groups of a token's channels, packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..stage import option
from .base import Codec, Encoded
from .formats import unpack
from .quantize import group_of, pack

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Grouped(Codec):
    """Integers with a scale and a zero per group: number = code * scale + zero, in float32.

    A group is `group` neighbouring channels of one token, keys like values, as transformers'
    quantized caches have it. A subclass has a field `bits` and says how numbers are chosen.

    codes [B, H, N, block * bits / 8, D] uint8, packed along tokens as in `formats.py`
    scale and zero [B, H, N, block, D / g] float16, g the largest divisor of D up to `group`
    each under `k_` or `v_`
    """

    block: int = option(64, "tokens per block", choices=(8, 16, 32, 64, 128, 256))
    tail: int = option(32, "newest tokens kept in full precision", ge=0)
    group: int = option(64, "channels per scale, lowered to a divisor of head_dim", ge=1)

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero [R, 1] of groups [R, g], all float32, each as if it were alone."""
        raise NotImplementedError

    def round(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes [R, g] from 0 to 2**bits - 1 of groups [R, g], given what is stored of them."""
        return ((x - zero) / scale).round().clamp(0, 2**self.bits - 1)

    def encode_side(self, x: Tensor, side: int) -> Encoded:
        D = x.shape[-1]
        g = group_of(D, self.group)
        rows = x.float().reshape(-1, g)
        # in float16, as beside a model of 16 bits; codes are those of what is stored
        scale, zero = (y.to(torch.float16) for y in self.choose(rows))
        scale = scale.clamp_min(2.0**-24)  # of a constant group, the least that float16 has
        codes = self.round(rows, scale.float(), zero.float()).to(torch.uint8).view(x.shape)
        packed = pack(codes.transpose(-1, -2), self.bits).transpose(-1, -2).contiguous()
        part, shape = "kv"[side], (*x.shape[:-1], D // g)
        return {
            f"{part}_codes": packed,
            f"{part}_scale": scale.view(shape),
            f"{part}_zero": zero.view(shape),
        }

    def decode_side(self, data: Encoded, side: int) -> Tensor:
        part = "kv"[side]
        scale, zero = (data[f"{part}_{name}"].float()[..., None] for name in ("scale", "zero"))
        codes = unpack(data[f"{part}_codes"].transpose(-1, -2), self.bits).transpose(-1, -2)
        return (codes.float().unflatten(-1, (scale.shape[-2], -1)) * scale + zero).flatten(-2)

    def max_error(self, data: Encoded, side: int) -> Tensor:
        """Half a step, and what float16 rounds of a scale and of a zero."""
        part = "kv"[side]
        scale, zero = (data[f"{part}_{name}"].float() for name in ("scale", "zero"))
        bound = scale / 2 + 2.0**-10 * (zero.abs() + scale * 2**self.bits) + 2.0**-24
        return bound.repeat_interleave(data[f"{part}_codes"].shape[-1] // scale.shape[-1], -1)
