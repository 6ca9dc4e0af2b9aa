"""`fp8`: floats of 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..stage import option
from .base import Codec, Encoded

if TYPE_CHECKING:
    from torch import Tensor

TYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(TYPE).max
LOST = 2.0**-4 + 2.0**-20  # of a number: half a step of its 3 bits, and what float32 rounds


@dataclass(frozen=True)
class Fp8(Codec):
    """8-bit floats (e4m3) with a scale per token: about half of bf16.

    The largest number of a token and head becomes the largest that the type has. (transformers'
    fp8 cache has one scale for a whole layer, that of the first call, and what is larger later is
    cut off.) Error <= 1/16 of the number, plus what is below the type's smallest.

    codes [B, H, N, block, D] uint8, the bits of float8_e4m3fn
    scale [B, H, N, block, 1] float32, which has the range of all that a model may run in
    each under `k_` or `v_`
    """

    name: ClassVar[str] = "fp8"
    block: int = option(64, "tokens per block", ge=1)
    tail: int = option(0, "newest tokens kept in full precision", ge=0)

    def encode_side(self, x: Tensor, side: int) -> Encoded:
        x = x.float()
        scale = (x.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(2.0**-100)
        codes = (x / scale).to(TYPE).view(torch.uint8)
        return {f"{'kv'[side]}_codes": codes, f"{'kv'[side]}_scale": scale}

    def decode_side(self, data: Encoded, side: int) -> Tensor:
        codes, scale = (data[f"{'kv'[side]}_{name}"] for name in ("codes", "scale"))
        return codes.view(TYPE).float() * scale

    def max_error(self, data: Encoded, side: int) -> Tensor:
        smallest = data[f"{'kv'[side]}_scale"] * 2.0**-9
        return LOST * self.decode_side(data, side).abs() + smallest
