"""Keys and values become codes, by plain torch, which specifies it, or by compiled loops."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from .feedback import round_keys
from .formats import LEVELS, levels
from .hadamard import turn
from .quantize import pack, quantize

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

    from .base import Encoded

# the largest number that a code of so many bits means, of the root mean square of values that are
# normal (Max, 1960); with more bits nothing is cut off
LARGEST = {2: 1.494, 3: 2.05, 4: 2.51}
HALF_A_LEVEL = 2 ** (-0.5 / LEVELS)  # by which a scale is rounded up on average


def encoder(device: torch.device) -> str:
    """What encodes tensors of a device: the kernel whose compiled loop it is, or `torch`."""
    return "torch" if _compiled(device) is None else "numba"


def keys(x: Tensor, bits: int, rounding: tuple[Tensor, Tensor] | None = None) -> Encoded:
    """Codes, scales and zeros of keys x [B, H, N, G, D], as `formats.decode_rotated` says.

    rounding: `order_and_weights` of the queries to round for; None: to the nearest code.
    """
    loops = _compiled(x.device)
    return (keys_in_torch if loops is None else loops.keys)(x, bits, rounding)


def values(x: Tensor, bits: int, group: int) -> Encoded:
    """Codes and scales of values x [B, H, N, G, D], a scale for `group` channels."""
    loops = _compiled(x.device)
    return (values_in_torch if loops is None else loops.values)(x, bits, group)


def keys_in_torch(x: Tensor, bits: int, rounding: tuple[Tensor, Tensor] | None = None) -> Encoded:
    """What `keys` does, in plain torch."""
    x = turn(x).transpose(-1, -2)
    codes, scale, zero = quantize(x, bits)
    if rounding is not None:
        codes = round_keys(x, scale, zero, bits, *rounding)
    return {"k_codes": pack(codes, bits), "k_scale": scale, "k_zero": zero}


def values_in_torch(x: Tensor, bits: int, group: int) -> Encoded:
    """What `values` does, in plain torch.

    A number is off by half a step, or by one where it is larger than what a code means.
    """
    grouped = turn(x).unflatten(-1, (-1, group))
    largest, half = grouped.abs().amax(-1), (2**bits - 1) / 2
    wanted = largest
    if bits in LARGEST:
        rms = grouped.square().mean(-1).sqrt()
        wanted = torch.minimum(LARGEST[bits] * rms, largest)
        wanted = torch.maximum(wanted * HALF_A_LEVEL, largest * (half / (half + 1)))
    steps = levels(bits, x.device)
    byte = torch.bucketize(wanted / half, steps).clamp(max=255)
    byte = torch.where(wanted.isnan(), 255, byte)
    inverse = 1 / steps[byte].clamp_min(1e-30)  # of 0: nothing but zeros
    codes = (grouped * inverse[..., None] + half).round().clamp(0, 2 * half)
    packed = pack(codes.to(torch.uint8).flatten(-2).transpose(-1, -2), bits)
    return {
        "v_codes": packed.transpose(-1, -2).contiguous(),
        "v_scale": byte.to(torch.uint8),
    }


def _compiled(device: torch.device) -> ModuleType | None:
    """The compiled loops, of the same functions; None: there are none."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return _loops()


@cache
def _loops() -> ModuleType | None:
    try:
        from ..kernels.numba import encoder
    except ModuleNotFoundError as e:
        if e.name != "numba":
            raise
        return None
    return encoder
