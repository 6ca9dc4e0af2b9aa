"""A codec that stores blocks as `affine`, as codecs from outside may: what holds kernels to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..codecs.base import Codec, Encoded
from ..codecs.formats import decode_affine
from ..codecs.quantize import group_of, half_step, pack, quantize

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Affine(Codec):
    """Integers with a scale and a zero, keys per channel, values per `group` channels of a token.

    Error <= scale / 2 (KIVI, arXiv:2402.02750). The tensors: `codecs/formats.py`.
    """

    name: ClassVar[str] = "affine"
    format: ClassVar[str] = "affine"
    block: int = 64
    tail: int = 0
    group: int = 32
    k_bits: int = 4
    v_bits: int = 4

    def encode_side(self, x: Tensor, side: int) -> Encoded:
        if side == 0:
            codes, scale, zero = quantize(x.float().transpose(-1, -2), self.k_bits)
            return {"k_codes": pack(codes, self.k_bits), "k_scale": scale, "k_zero": zero}
        group = group_of(x.shape[-1], self.group)
        codes, scale, zero = quantize(x.float().unflatten(-1, (-1, group)), self.v_bits)
        packed = pack(codes.flatten(-2).transpose(-1, -2), self.v_bits).transpose(-1, -2)
        return {"v_codes": packed.contiguous(), "v_scale": scale, "v_zero": zero}

    def decode_side(self, data: Encoded, side: int) -> Tensor:
        return decode_affine(self, data, side)

    def max_error(self, data: Encoded, side: int) -> Tensor:
        if side == 0:
            return half_step(data["k_scale"], data["k_zero"], self.k_bits)[..., None, :]
        v = half_step(data["v_scale"], data["v_zero"], self.v_bits)  # [B, H, N, block, Dv/g]
        return v.repeat_interleave(data["v_codes"].shape[-1] // v.shape[-1], dim=-1)
