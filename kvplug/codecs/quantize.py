"""Numbers become codes: groups with a scale and a zero, and codes packed into bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .formats import PLANES

if TYPE_CHECKING:
    from torch import Tensor

F16_MAX = torch.finfo(torch.float16).max


def group_of(D: int, most: int) -> int:
    """The largest divisor of D that is at most `most`: a head dim of 80 or 112 needs no padding."""
    return next(g for g in range(min(most, D), 0, -1) if D % g == 0)


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
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


def half_step(scale: Tensor, zero: Tensor, bits: int, lost: float = 2.0**-21) -> Tensor:
    """Half a quantization step, and what float32 loses, of a number, on the way there and back."""
    return scale.float() / 2 + lost * (zero.float().abs() + scale.float() * 2**bits)


def _round_down(x: Tensor) -> Tensor:
    """A float16 that is not above x, at most two float16 steps below."""
    y = _to_float16(x)
    step = (y.abs() * 2.0**-10).clamp_min(2.0**-24)  # one or two steps of float16 at y
    return _to_float16(torch.where(y > x, y - step, y)).to(torch.float16)


def _to_float16(x: Tensor) -> Tensor:
    """`x.to(torch.float16).float()` of float32; where it is compiled by arithmetic.

    A compiler that fuses both casts leaves them out (torch.compile does, unless
    `emulate_precision_casts` is set), and codes would not fit the scale that is stored.
    """
    if not torch.compiler.is_compiling():
        return x.to(torch.float16).float()
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # of two, at most |x|
    step = (power * 2.0**-10).clamp(2.0**-24, 2.0**6)  # of float16 at x
    return (x / step).round() * step


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., G] uint8 below 2**bits -> [..., G * bits / 8] uint8."""
    if low := PLANES.get(bits):
        planes = pack(codes & (2**low - 1), low), pack(codes >> low, bits - low)
        return torch.cat(planes, dim=-1)
    if bits == 8:
        return codes.contiguous()
    if bits == 1:
        codes = codes.unflatten(-1, (-1, 8))
        return (codes << torch.arange(8, dtype=torch.uint8, device=codes.device)).sum(
            -1, dtype=torch.uint8
        )
    packed = None
    for i, part in enumerate(codes.chunk(8 // bits, dim=-1)):
        packed = part if packed is None else packed | (part << (i * bits))
    return packed.contiguous()
