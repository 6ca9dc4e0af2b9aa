"""`int8_shift`: 8-bit integers whose steps are powers of two, read by kvplug's kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from kvplug import Codec, option
from kvplug.codecs.formats import decode_affine

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Int8Shift(Codec):
    """8-bit integers, steps of a power of two: scales are exact, whatever a compiler does to casts.

    Keys per channel over a block, values per token; zeros are multiples of the step. Error <=
    scale / 2, of scales up to twice as large as int8's. Blocks are of the format `affine`
    (kvplug/codecs/formats.py), so that the compiled kernels read them.
    """

    name: ClassVar[str] = "int8_shift"
    format: ClassVar[str] = "affine"
    k_bits: ClassVar[int] = 8
    v_bits: ClassVar[int] = 8
    block: int = option(64, "tokens per block", choices=(8, 16, 32, 64, 128))
    tail: int = option(0, "newest tokens kept in full precision", ge=0)

    def encode_side(self, x: Tensor, side: int) -> dict[str, Tensor]:
        x = x.float().transpose(-1, -2) if side == 0 else x.float()
        low, high = x.amin(-1), x.amax(-1)
        # 255 steps from zero on; zero itself has to fit into the 11 bits of a float16
        step = torch.maximum((high - low) / 254, torch.maximum(low.abs(), high.abs()) / 1024)
        scale = step.clamp_min(2.0**-24).log2().ceil().exp2()
        scale = torch.where(scale < step, 2 * scale, scale)  # a logarithm rounds
        scale = torch.where(step.isfinite(), scale, step)
        zero = (low / scale).floor() * scale
        codes = ((x - zero[..., None]) / scale[..., None]).round().clamp(0, 255).to(torch.uint8)
        scale, zero = scale.to(torch.float16), zero.to(torch.float16)
        if side == 0:
            return {"k_codes": codes, "k_scale": scale, "k_zero": zero}
        return {"v_codes": codes, "v_scale": scale[..., None], "v_zero": zero[..., None]}

    def decode_side(self, data: dict[str, Tensor], side: int) -> Tensor:
        return decode_affine(self, data, side)

    def max_error(self, data: dict[str, Tensor], side: int) -> Tensor:
        half = (0.5 + 2.0**-9) * data["kv"[side] + "_scale"].float()  # float32 loses a little
        return half[..., None, :] if side == 0 else half
