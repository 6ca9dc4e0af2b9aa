"""`int8_token`: symmetric 8-bit integers, one scale per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from kvplug import Codec, option

if TYPE_CHECKING:
    from torch import Tensor

SCALES = "k_scale", "v_scale"


@dataclass(frozen=True)
class Int8Token(Codec):
    """Symmetric int8, one scale per head and token. Error <= scale / 2 per element.

    The granularity is KIVI's for values (arXiv:2402.02750). Departs from it: keys are per token
    too, where their outlier channels widen the step of all others, and 8-bit symmetric.

    k, v [B, H, N, block, D] int8, k_scale, v_scale [B, H, N, block, 1] float32
    """

    name: ClassVar[str] = "int8_token"
    block: int = option(64, "tokens per block", ge=1)
    tail: int = option(0, "newest tokens kept in full precision", ge=0)

    def encode_side(self, x: Tensor, side: int) -> dict[str, Tensor]:
        x = x.float()  # in bfloat16 x / scale reaches 127.5: rounds to 128, wraps to -128
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127  # zeros divide well
        return {"kv"[side]: (x / scale).round().to(torch.int8), SCALES[side]: scale}

    def decode_side(self, data: dict[str, Tensor], side: int) -> Tensor:
        return data["kv"[side]] * data[SCALES[side]]

    def max_error(self, data: dict[str, Tensor], side: int) -> Tensor:
        # half a step, and what float32 loses at 127 steps from zero
        return data[SCALES[side]] * (0.5 + 2.0**-15)
