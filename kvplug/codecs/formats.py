"""The byte formats that kernels read: which tensors an encoded block is, and what they mean.

A codec that stores one of them, whoever wrote it and however it chose the numbers, says so by
`Codec.format` and is read by every kernel that lists the format in `Kernel.formats`. The functions
here are their specification; sides are keys (0) and values (1). A format never changes: other bytes
have another name.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from .hadamard import spreader

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from torch import Tensor

    from .base import Encoded

    Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]

WIDTHS = (2, 4, 8)  # bits of a code in one plane
# bits of a code in two planes -> how many of them, the lowest, are in the first
PLANES = {3: 2, 5: 4, 6: 4}


def decode_plain(codec: Any, data: Encoded, side: int) -> Tensor:
    """Tokens as they came.

    k [B, H, N, block, Dk], v [B, H, N, block, Dv], in the model's dtype
    """
    return data["kv"[side]]


def decode_affine(codec: Any, data: Encoded, side: int) -> Tensor:
    """Integers with a scale and a zero per group: number = code * scale + zero, in float32.

    k_codes [B, H, N, Dk, block*k_bits/8] uint8, k_scale and k_zero [B, H, N, Dk] float16
    v_codes [B, H, N, block*v_bits/8, Dv] uint8, v_scale and v_zero [B, H, N, block, Dv/g] float16
    Each channel of a block's keys is a group, and each g neighbouring channels of a token's value;
    g is any divisor of Dv. `codec` has `block`, a multiple of 8, and `k_bits` and `v_bits`, each of
    WIDTHS. Keys are channel-major, so that scores run along tokens. Codes are packed along tokens:
    with 4 bits, byte i holds token i in its low half and token i + block/2 in its high half; with 2
    bits, i + block/4 * (0, 1, 2, 3).
    """
    if side == 0:
        return _channel_keys(codec, data)
    codes = _value_codes(codec, data)
    grouped = codes.unflatten(-1, (data["v_scale"].shape[-1], -1))
    values = grouped * data["v_scale"].float()[..., None] + data["v_zero"].float()[..., None]
    return values.flatten(-2)


def decode_rotated(codec: Any, data: Encoded, side: int) -> Tensor:
    """Integers of keys and values that were turned by U, the `spreader` of their head dim.

    k_codes, k_scale, k_zero: as in `affine`, of k' = U k / Dk
    v_codes [B, H, N, block*v_bits/8, Dv] uint8: as in `affine`, of v' = U v / Dv
    v_scale [B, H, N, block, Dv/g] uint8: for each g neighbouring channels of v' of a token, the
        largest number that a code means, `levels` of it
    A value's numbers are symmetric: 2 * code / (2**v_bits - 1) - 1, of the largest. A kernel need
    not turn anything back but its own result: q . k = U q . k', and the output is U.T of that of
    v'. In `rotated_planes` codes may have the bits of PLANES too: two planes, each packed along
    tokens, one after the other, the lowest 2, 4 and 4 bits of 3, 5 and 6, then the highest 1, 1 and
    2. Of a plane of 1 bit, byte i holds tokens 8 i to 8 i + 7, the first in its lowest bit.
    """
    if side == 0:
        keys = _channel_keys(codec, data)
        return keys @ spreader(keys.shape[-1], keys.device)
    codes = _value_codes(codec, data)
    grouped = codes.unflatten(-1, (data["v_scale"].shape[-1], -1)) - (2**codec.v_bits - 1) / 2
    scale = levels(codec.v_bits, codes.device)[data["v_scale"].int()]
    values = (grouped * scale[..., None]).flatten(-2)
    return values @ spreader(values.shape[-1], values.device)


# of a byte of `v_scale`: the largest number is 2 ** ((byte - LEVEL_0) / LEVELS)
LEVELS, LEVEL_0 = 8, 120


def levels(bits: int, device: torch.device) -> Tensor:
    """Steps [256] float32 between neighbouring numbers of a value, by its byte of `v_scale`.

    The first is 0 and the last infinite: nothing is there, or nothing that is finite.
    """
    return (_levels if torch.compiler.is_compiling() else _kept_levels)(bits, device)


def _levels(bits: int, device: torch.device) -> Tensor:
    byte = torch.arange(256, device=device)
    step = torch.exp2((byte.double() - LEVEL_0) / LEVELS) * (2 / (2**bits - 1))
    step = torch.where(byte == 0, 0.0, step)
    return torch.where(byte == 255, torch.inf, step).float()


@cache
def _kept_levels(bits: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # any later call may use it
        return _levels(bits, device)


def _channel_keys(codec: Any, data: Encoded) -> Tensor:
    codes = unpack(data["k_codes"], codec.k_bits).float()
    keys = codes * data["k_scale"].float()[..., None]
    return (keys + data["k_zero"].float()[..., None]).transpose(-1, -2)


def _value_codes(codec: Any, data: Encoded) -> Tensor:
    return unpack(data["v_codes"].transpose(-1, -2), codec.v_bits).transpose(-1, -2).float()


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Packed [..., G * bits / 8] uint8 -> codes [..., G] uint8."""
    if low := PLANES.get(bits):
        first = packed.shape[-1] * low // bits
        high = unpack(packed[..., first:], bits - low)
        return unpack(packed[..., :first], low) | (high << low)
    if bits == 8:
        return packed
    if bits == 1:
        shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
        return ((packed[..., None] >> shifts) & 1).flatten(-2)
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=-1)


def plain_tensors(codec: Any, keys: Tensor, values: Tensor, data: Encoded) -> Tensors:
    """What `decode_plain` says."""
    return {name: (x.dtype, x.shape[3:]) for name, x in zip("kv", (keys, values), strict=True)}


def affine_tensors(codec: Any, keys: Tensor, values: Tensor, data: Encoded) -> Tensors:
    """What `decode_affine` says."""
    block, Dk = keys.shape[-2:]
    Dv, groups = values.shape[-1], data["v_scale"].shape[-1]
    key, value = (torch.float16, (Dk,)), (torch.float16, (block, groups))
    return {
        "k_codes": (torch.uint8, (Dk, block * codec.k_bits // 8)),
        "k_scale": key,
        "k_zero": key,
        "v_codes": (torch.uint8, (block * codec.v_bits // 8, Dv)),
        "v_scale": value,
        "v_zero": value,
    }


def rotated_tensors(codec: Any, keys: Tensor, values: Tensor, data: Encoded) -> Tensors:
    """What `decode_rotated` says."""
    found = affine_tensors(codec, keys, values, data)
    del found["v_zero"]
    return found | {"v_scale": (torch.uint8, found["v_scale"][1])}


class Format(NamedTuple):
    """decode: codec, encoded tensors and side -> keys or values [B, H, N, block, D].

    tensors: codec, keys and values [B, H, N, block, D], and their encoded tensors -> what these are
    to be: dtype, and shape after [B, H, N].
    """

    decode: Callable[[Any, Encoded, int], Tensor]
    tensors: Callable[[Any, Tensor, Tensor, Encoded], Tensors]


FORMATS = {
    "plain": Format(decode_plain, plain_tensors),
    "affine": Format(decode_affine, affine_tensors),
    "rotated": Format(decode_rotated, rotated_tensors),
    "rotated_planes": Format(decode_rotated, rotated_tensors),
}
