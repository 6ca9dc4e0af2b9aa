"""`int` and its presets: group-wise asymmetric integers, keys per channel, values per token."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..errors import SpecError
from ..stage import option
from .base import Codec, Encoded
from .formats import PLANES, WIDTHS, decode_affine

if TYPE_CHECKING:
    from torch import Tensor

F16_MAX = torch.finfo(torch.float16).max


def _bits(default: int) -> Any:
    return option(default, "bits per key or value", choices=tuple(sorted((*WIDTHS, *PLANES))))


def _tail(default: int) -> Any:
    return option(default, "newest tokens kept in full precision", ge=0)


@dataclass(frozen=True)
class Affine(Codec):
    """Integers of 2 to 8 bits, keys and values apart; `int8`, `int4` and `int2` are presets.

    Asymmetric, with a float16 scale and zero per group; error <= scale / 2.
    Keys have outlier channels, values do not: a group is one channel over the tokens of a block
    for keys, `group` neighbouring channels of one token for values (KIVI, arXiv:2402.02750).
    Departures from it: 8 bits too, widths of K and V apart, and blocks are never encoded again.
    The tensors: `formats.py`.
    """

    name: ClassVar[str] = "int"
    block: int = option(64, "tokens per block", choices=(8, 16, 32, 64, 128, 256))
    group: int = option(32, "value channels per scale, lowered to a divisor of head_dim", ge=1)
    tail: int = _tail(64)
    k_bits: int = _bits(4)
    v_bits: int = _bits(4)

    @cached_property  # asked in every call of a kernel
    def format(self) -> str:
        return "affine" if {self.k_bits, self.v_bits} <= set(WIDTHS) else "affine_planes"

    def encode_side(self, x: Tensor, side: int) -> Encoded:
        if side == 0:
            codes, scale, zero = _quantize(x.float().transpose(-1, -2), self.k_bits)
            return {"k_codes": _pack(codes, self.k_bits), "k_scale": scale, "k_zero": zero}
        grouped = x.float().unflatten(-1, (-1, self._value_group(x.shape[-1])))
        codes, scale, zero = _quantize(grouped, self.v_bits)
        packed = _pack(codes.flatten(-2).transpose(-1, -2), self.v_bits).transpose(-1, -2)
        return {"v_codes": packed.contiguous(), "v_scale": scale, "v_zero": zero}

    def decode_side(self, data: Encoded, side: int) -> Tensor:
        return decode_affine(self, data, side)

    def max_error(self, data: Encoded, side: int) -> Tensor:
        if side == 0:
            k = _half_step(data["k_scale"], data["k_zero"], self.k_bits)
            return k[..., None, :]  # [B, H, N, 1, Dk]
        v = _half_step(data["v_scale"], data["v_zero"], self.v_bits)  # [B, H, N, block, Dv/g]
        return v.repeat_interleave(data["v_codes"].shape[-1] // v.shape[-1], dim=-1)

    def _value_group(self, head_dim: int) -> int:
        """The largest divisor of head_dim that is at most `group`: 80 or 112 need no padding."""
        return next(g for g in range(min(self.group, head_dim), 0, -1) if head_dim % g == 0)


def _quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [..., G] uint8, scale and zero [...] float16 of x [..., G]; error <= scale / 2.

    The zero is rounded down to float16 first and the scale up afterwards, so that the rounding of a
    large zero (keys of Qwen2 have a bias of several hundred) widens the range a little instead of
    shifting the whole group.
    """
    low, high = x.amin(-1), x.amax(-1)
    # below the range of float16 the zero becomes -inf, which shows; above it, the scale makes up
    zero = _round_down(low.clamp(max=F16_MAX))
    scale = -_round_down(-(high - zero.float()) / (2**bits - 1))
    step = scale.float().clamp_min(1e-30)[..., None]  # a constant group has scale 0 and codes 0
    codes = ((x - zero.float()[..., None]) / step).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, zero


def _half_step(scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Half a quantization step, and what float32 loses on the way there and back."""
    return scale.float() / 2 + 2.0**-21 * (zero.float().abs() + scale.float() * 2**bits)


def _round_down(x: Tensor) -> Tensor:
    """A float16 that is not above x, at most two float16 steps below."""
    y = _to_float16(x)
    step = (y.abs() * 2.0**-10).clamp_min(2.0**-24)  # one or two steps of float16 at y
    return _to_float16(torch.where(y > x, y - step, y)).to(torch.float16)


def _to_float16(x: Tensor) -> Tensor:
    """`x.to(torch.float16).float()` of float32, by arithmetic: the casts that follow are exact.

    A compiler that fuses them leaves both out (torch.compile does, unless
    `emulate_precision_casts` is set), and codes would not fit the scale that is stored.
    """
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # of two, at most |x|
    step = (power * 2.0**-10).clamp(2.0**-24, 2.0**6)  # of float16 at x
    return (x / step).round() * step


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., G] uint8 below 2**bits -> [..., G * bits / 8] uint8."""
    if low := PLANES.get(bits):
        planes = _pack(codes & (2**low - 1), low), _pack(codes >> low, bits - low)
        return torch.cat(planes, dim=-1)
    if bits == 8:
        return codes.contiguous()
    packed = None
    for i, part in enumerate(codes.chunk(8 // bits, dim=-1)):
        packed = part if packed is None else packed | (part << (i * bits))
    return packed.contiguous()


@dataclass(frozen=True)
class Preset(Affine):
    """Bits that are those of the name: they stand in its repr, and no others are taken."""

    def __post_init__(self) -> None:
        super().__post_init__()
        cls = type(self)  # where a dataclass keeps its defaults
        if (self.k_bits, self.v_bits) != (cls.k_bits, cls.v_bits):
            raise SpecError(
                f"{self}: {self.name!r} has {cls.k_bits} bits for keys and {cls.v_bits} for "
                f"values; write {str(Affine(**dataclasses.asdict(self)))!r}"
            )


@dataclass(frozen=True)
class Int8(Preset):
    """8-bit integers: about half of bf16, drift near nothing (KL 1e-4)."""

    name: ClassVar[str] = "int8"
    tail: int = _tail(0)
    k_bits: int = _bits(8)
    v_bits: int = _bits(8)


@dataclass(frozen=True)
class Int4(Preset):
    """4-bit integers: less than a third of bf16, small drift; the newest 64 tokens stay exact."""

    name: ClassVar[str] = "int4"


@dataclass(frozen=True)
class Int2(Preset):
    """2-bit integers: a fifth of bf16 and heavy drift on small models; for research."""

    name: ClassVar[str] = "int2"
    k_bits: int = _bits(2)
    v_bits: int = _bits(2)
