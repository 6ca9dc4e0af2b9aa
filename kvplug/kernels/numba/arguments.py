"""What the compiled kernel is told of tensors: addresses, sizes and strides, all of them integers.

Strides count numbers of the tensor's own format, not bytes. What Python passes are flat tuples, the
cheapest that Numba takes apart and the only ones that it takes along into `prange`; the functions
`..._from` give their members back the names that they have here.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple, get_type_hints

import torch
from numba import float64, intp, types
from torch.nn.functional import pad

from ...codecs.formats import levels
from ...codecs.hadamard import spreader
from .simd import LANES
from .tiles import inlined

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

    from ...codecs.base import Codec, Encoded

NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # formats of plain numbers


class Rows(NamedTuple):
    """A tensor [B, H, n, D] whose last axis is contiguous: address and strides."""

    address: int
    batch: int
    head: int
    row: int


class Blocks(NamedTuple):
    """A tensor [B, H, N, n, D], or [B, H, N, n], whose last axis is contiguous."""

    address: int
    batch: int
    head: int
    block: int
    row: int


class Query(NamedTuple):
    """Query [B, G * H, S, Dk], its numbers of a format of NUMBERS."""

    number: int
    rows: Rows


class Mask(NamedTuple):
    """Mask [B, G * H, S, T]: 1, of bytes, where 0 hides; 2, of floats that are added; 0, none."""

    kind: int
    rows: Rows


class Tokens(NamedTuple):
    """Plain tokens, of which the first `skip` are hidden; numbers of a format of NUMBERS."""

    count: int
    skip: int
    number: int
    keys: Rows
    values: Rows


class Codes(NamedTuple):
    """Tokens in blocks of `affine` or of `rotated`, of which the first `skip` are hidden.

    Of `affine` there is nothing to turn, and scales and zeros are float16. Of `rotated` the scales
    of values are bytes, and there are no zeros.
    """

    count: int
    skip: int
    block: int
    k_bits: int
    v_bits: int
    groups: int  # scales of a value
    turn: int  # address of floats [Dk, Dk in whole vectors]: query @ these meets the keys; or 0
    turn_back: (
        int  # of floats [Dv, Dv in whole vectors]: what the values gave @ these is the output
    )
    steps: int  # of floats [256]: between two numbers of a value, by its scale
    k_codes: Blocks
    k_scale: Blocks
    k_zero: Blocks
    v_codes: Blocks
    v_scale: Blocks
    v_zero: Blocks


# --- in Python


def query_of(x: Tensor) -> tuple[int, ...]:
    """`Query` of a query [B, Q, S, Dk]."""
    return (NUMBERS[x.dtype], *_rows(x))


def mask_of(x: Tensor | None) -> tuple[int, ...]:
    """`Mask` of a mask [B, Q, S, T], bool or float32."""
    return NO_MASK if x is None else (1 + x.is_floating_point(), *_rows(x))


def tokens_of(keys: Tensor, values: Tensor) -> tuple[int, ...]:
    """`Tokens` of keys and values [B, H, n, D] as they came."""
    return (keys.shape[2], 0, NUMBERS[keys.dtype], *_rows(keys), *_rows(values))


def tokens_of_blocks(data: Encoded, count: int, skip: int) -> tuple[int, ...]:
    """`Tokens` of blocks [B, H, N, block, D] of the format `plain`, which lie end to end."""
    (*k, _, k_row), (*v, _, v_row) = (_blocks(data[name]) for name in "kv")
    return (count, skip, NUMBERS[data["k"].dtype], *k, k_row, *v, v_row)


def codes_of(codec: Codec, data: Encoded, count: int, skip: int) -> tuple[int, ...]:
    """`Codes` of blocks of the formats `affine`, `rotated` and `rotated_planes`."""
    scale = data["v_scale"]
    numbers = [count, skip, codec.block, codec.k_bits, codec.v_bits, scale.shape[-1]]
    if codec.format == "affine":
        numbers += 0, 0, 0
    else:
        numbers += _turns(data["k_codes"].shape[3], data["v_codes"].shape[4])
        numbers.append(levels(codec.v_bits, CPU).data_ptr())
    for name in AFFINE:
        numbers += _blocks(data.get(name, scale))
    return tuple(numbers)


@cache
def _turns(Dk: int, Dv: int) -> tuple[int, int]:
    """The addresses `turn` and `turn_back` of `Codes`, for as long as the process lives."""
    matrices = spreader(Dk, CPU).T, spreader(Dv, CPU)
    for x in matrices:
        KEPT.append(pad(x, (0, -x.shape[1] % LANES)).contiguous())
    return KEPT[-2].data_ptr(), KEPT[-1].data_ptr()


def _rows(x: Tensor) -> tuple[int, ...]:
    return (x.data_ptr(), *x.stride()[:3])


def _blocks(x: Tensor) -> tuple[int, ...]:
    return (x.data_ptr(), *x.stride()[:4])


AFFINE = Codes._fields[9:]
CPU = torch.device("cpu")
KEPT: list[Tensor] = []


def _length(kind: Any) -> int:
    """How many integers a named tuple is."""
    return 1 if kind is int else sum(map(_length, get_type_hints(kind).values()))


NO_TOKENS, NO_CODES, NO_MASK = ((0,) * _length(kind) for kind in (Tokens, Codes, Mask))
# of `attend`: shape, plan, query, scale, head, plain, codes, tail, mask, memory
SIGNATURE = tuple(
    float64 if n is None else types.UniTuple(intp, n if isinstance(n, int) else _length(n))
    for n in (7, 3, Query, None, Tokens, Tokens, Codes, Tokens, Mask, 3)
)


# --- compiled


@inlined
def query_from(x):
    """`Query` of flat integers."""
    return Query(x[0], Rows(*x[1:]))


@inlined
def mask_from(x):
    """`Mask` of flat integers."""
    return Mask(x[0], Rows(*x[1:]))


@inlined
def tokens_from(x):
    """`Tokens` of flat integers."""
    return Tokens(*x[:3], Rows(*x[3:7]), Rows(*x[7:]))


@inlined
def codes_from(x):
    """`Codes` of flat integers."""
    return Codes(
        *x[:9],
        Blocks(*x[9:14]),
        Blocks(*x[14:19]),
        Blocks(*x[19:24]),
        Blocks(*x[24:29]),
        Blocks(*x[29:34]),
        Blocks(*x[34:]),
    )
