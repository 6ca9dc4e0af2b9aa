"""The byte formats that kernels read: which tensors an encoded block is, and what they mean.

A codec that stores one of them, whoever wrote it and however it chose the numbers, says so by
`Codec.format` and is read by every kernel that lists the format in `Kernel.formats`. The functions
here are their specification; sides are keys (0) and values (1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from torch import Tensor

    from .base import Encoded

    Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]

WIDTHS = (2, 4, 8)  # bits of a code in `affine`
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
    WIDTHS, or in the format `affine_planes` of PLANES too. Keys are channel-major, so that scores
    run along tokens. Codes are packed along tokens: with 4 bits, byte i holds token i in its low
    half and token i + block/2 in its high half; with 2 bits, i + block/4 * (0, 1, 2, 3); with 1
    bit, i + block/8 * (0, ..., 7). Codes of 3, 5 and 6 bits are two planes packed like that, one
    after the other: the lowest 2, 4 and 4 bits of all tokens, then the highest 1, 1 and 2.
    """
    if side == 0:
        codes = unpack(data["k_codes"], codec.k_bits).float()
        keys = codes * data["k_scale"].float()[..., None]
        return (keys + data["k_zero"].float()[..., None]).transpose(-1, -2)
    codes = unpack(data["v_codes"].transpose(-1, -2), codec.v_bits).transpose(-1, -2).float()
    grouped = codes.unflatten(-1, (data["v_scale"].shape[-1], -1))
    values = grouped * data["v_scale"].float()[..., None] + data["v_zero"].float()[..., None]
    return values.flatten(-2)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Packed [..., G * bits / 8] uint8 -> codes [..., G] uint8."""
    if low := PLANES.get(bits):
        first = packed.shape[-1] * low // bits
        high = unpack(packed[..., first:], bits - low)
        return unpack(packed[..., :first], low) | (high << low)
    if bits == 8:
        return packed
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
    "affine_planes": Format(decode_affine, affine_tensors),
}
