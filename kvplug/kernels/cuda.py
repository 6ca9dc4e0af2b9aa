"""`triton`: split-K flash decoding on CUDA; encoded keys and values are unpacked in registers.

One program reads a share of the columns for all queries of one stored head, or a tile of them:
pinned tokens, encoded blocks, tail, with an online softmax in float32 (arXiv:1805.02867). Where
several programs share the columns of a head, a second, small kernel merges what they found by
log-sum-exp (https://pytorch.org/blog/flash-decoding).

Axes in kernels: M rows, of the G * S queries of a stored head; K channels of a key; GROUPS x WIDTH
channels of a value; t columns of a step. Each is padded to a power of two that tensor cores take. A
tensor comes as a tuple: pointer and strides, the last one of tokens or blocks; what follows that
axis is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

import torch
import triton
import triton.language as tl

from .base import Kernel

if TYPE_CHECKING:
    from torch import Tensor

    from ..attention.stored import Stored
    from ..codecs.base import Codec

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1
DEVICES = ("cuda", "meta", "cpu") if INTERPRETED.value else ("cuda", "meta")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ENCODED = ("k_codes", "k_scale", "k_zero", "v_codes", "v_scale", "v_zero")
PROGRAMS = 4  # per multiprocessor: twice as many as its registers hold evens out the end
STEPS = 2  # of one program, at least: merging many short shares costs more than sharing saves
SPLITS = 128  # of one head, at most: the merging kernel holds all shares of a row at once


@dataclass(frozen=True)
class Triton(Kernel):
    """CUDA: a block is unpacked in registers, once for all queries of its head."""

    name: ClassVar[str] = "triton"
    formats: ClassVar[tuple[str, ...]] = ("plain", "affine")

    def attend(
        self,
        query: Tensor,
        stored: Stored,
        mask: Tensor | None,
        scale: float | None,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor]:
        B, Q, S, Dk = query.shape
        _, H, R, Dv = stored.tail[1].shape
        head, middle, tail = _tokens(stored.head), _middle(stored), _tokens(stored.tail)
        F, N = (0 if piece is None else piece[0][0].shape[2] for piece in (head, middle))
        groups = stored.blocks["v_scale"].shape[4] if "v_scale" in stored.blocks else 0
        rows = Q // H * S
        Z = _sizes(min(rows, 64), Dk, Dv, query.element_size(), is_causal, stored.codec, groups)

        grid = triton.cdiv(rows, Z.ROWS), B * H
        steps = sum(triton.cdiv(n, Z.TILE) for n in (F, R)) + triton.cdiv(N * Z.BLOCK, Z.STEP)
        share = _share(steps, grid[0] * grid[1], query.device)
        splits = max(1, triton.cdiv(steps, share))
        out = query.new_empty(B, Q, S, Dv)
        lse = query.new_empty(B, Q, S, dtype=torch.float32)
        found = out, lse
        if splits > 1:
            found = lse.new_empty(splits, B * Q * S, Dv), lse.new_empty(splits, B * Q * S)
        if mask is not None:
            mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
            mask = _strided(mask.expand(B, Q, S, stored.length), axes=4)
        skip = stored.skip if groups else 0  # `_middle` has left out the others
        scale = float(Dk**-0.5 if scale is None else scale)
        with torch.cuda.device_of(query):  # Triton launches on the current device
            _attend[(*grid, splits)](
                *(_strided(_rows(query)), mask, head, middle, tail, *found),
                *(F, N, R, skip, H, Q // H, S, share, scale, Z),
                num_warps=Z.warps,
                num_stages=Z.stages,
                enable_fp_fusion=True,  # said aloud: Triton 3.10 does without by default
            )
            if splits > 1:
                padded = triton.next_power_of_2(Dv), triton.next_power_of_2(splits)
                _merge[(B * Q * S,)](
                    *(*found, out, lse, splits, Dv, *padded),
                    num_warps=8 if splits * Dv > 8192 else 4,
                    enable_fp_fusion=True,
                )
        return out, lse

    def refuses(
        self,
        codec: Codec,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> str | None:
        if reason := super().refuses(codec):
            return reason
        if device is not None and device.type not in DEVICES:
            return f"needs a CUDA device, not {device.type!r} (TRITON_INTERPRET=1 interprets it)"
        if dtype is not None and dtype not in DTYPES:
            return f"reads float32, float16 and bfloat16, not {dtype}"
        return None


# --- arguments, from shapes and strides alone: nothing waits for the device


def _strided(x: Tensor, axes: int = 3) -> tuple:
    """A tensor and the strides of its first axes."""
    return (x, *x.stride()[:axes])


def _rows(x: Tensor) -> Tensor:
    """A few tokens [B, H, n, D], whose channels must be contiguous, as they nearly always are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _tokens(pair: tuple[Tensor, Tensor] | None) -> tuple | None:
    """Keys and values as they came."""
    return None if pair is None else tuple(_strided(_rows(x)) for x in pair)


def _middle(stored: Stored) -> tuple | None:
    """Encoded blocks; those of `exact` are tokens as they came, from the first visible one on."""
    if not stored.block_count:
        return None
    if "k" in stored.blocks:
        sides = (stored.blocks[name].flatten(2, 3)[:, :, stored.skip :] for name in "kv")
        return tuple(_strided(x) for x in sides)
    return tuple(_strided(stored.blocks[name]) for name in ENCODED)


@dataclass(frozen=True)
class Sizes:
    """What the kernel is compiled for."""

    CAUSAL: bool
    DK: int
    DV: int
    K: int  # DK, padded
    GROUP: int  # value channels of one scale
    GROUPS: int  # padded
    WIDTH: int  # GROUP, padded
    ROWS: int  # at once
    TILE: int  # tokens as they came at once
    warps: int
    stages: int
    K_BITS: int = 0  # 0: the middle is tokens as they came
    V_BITS: int = 0
    BLOCK: int = 1  # tokens
    STEP: int = 1  # tokens of a block at once
    RUNS: int = 1  # of consecutive tokens in a step
    PAD: int = 1  # tokens of a run, padded


@cache
def _sizes(
    rows: int, Dk: int, Dv: int, itemsize: int, is_causal: bool, codec: Codec, groups: int
) -> Sizes:
    """Sizes by rule; groups: scales per value, 0 without encoded blocks.

    A rule and not `triton.autotune`, which times all candidates anew for each new key, in the
    middle of an answer. Decoding is bound by memory, which several small programs per
    multiprocessor hide.
    """
    heavy = max(1, _padded(max(Dk, Dv)) * itemsize // 256)  # 128 channels of 16 bits: 1
    ROWS = min(_padded(rows), max(16, 64 // heavy))
    light = ROWS == 16 and heavy == 1
    GROUPS = triton.next_power_of_2(groups or 1)
    common = {
        "CAUSAL": is_causal,
        "DK": Dk,
        "DV": Dv,
        "K": _padded(Dk),
        "GROUP": Dv // (groups or 1),
        "GROUPS": GROUPS,
        "WIDTH": _padded(Dv // (groups or 1), 16 // GROUPS),
        "ROWS": ROWS,
        "TILE": max(16, min(64 // heavy, 32 if ROWS == 16 else 64)),
        "warps": 4 if light else 8,
        "stages": 3 if light else 2,
    }
    if not groups:
        return Sizes(**common, STEP=common["TILE"])
    step = min(codec.block, 64 if itemsize == 2 else 64 // heavy)
    RUNS = 8 // min(codec.k_bits, codec.v_bits)
    return Sizes(
        **common,
        K_BITS=codec.k_bits,
        V_BITS=codec.v_bits,
        BLOCK=codec.block,
        STEP=step,
        RUNS=RUNS,
        PAD=_padded(step) // RUNS,
    )


def _padded(n: int, least: int = 16) -> int:
    """The next power of two, and as much as tensor cores ask."""
    return max(least, triton.next_power_of_2(n))


def _share(steps: int, programs: int, device: torch.device) -> int:
    """Steps of one program: so many that the device is full, and that each has enough to do."""
    splits = min(SPLITS, max(1, PROGRAMS * _multiprocessors(device) // programs))
    return max(STEPS, triton.cdiv(steps, splits))


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # interpreted
    return torch.cuda.get_device_properties(device).multi_processor_count


# --- kernels; Z: Sizes


@triton.jit(do_not_specialize=["F", "N", "R", "skip", "H", "G", "S", "share"])
def _attend(
    query, mask, head, middle, tail, out, lse,
    F, N, R, skip, H, G, S, share, scale, Z: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of rows over one share of the columns.

    The columns are F pinned tokens, N blocks less `skip` hidden tokens (without K_BITS: N tokens),
    and R tokens of the tail. A step is TILE tokens as they came or STEP tokens of a block, a share
    so many steps. Writes out [shares, B * H * G * S, DV] and lse [shares, B * H * G * S].
    """
    # 64 bits: a cache may exceed 2**31 elements
    at = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    row = tl.program_id(0) * Z.ROWS + tl.arange(0, Z.ROWS)
    real = tl.minimum(row, G * S - 1)  # padding repeats the last row: nothing to mask in loads
    b, g, s = at[0], at[1] * G + real // S, real % S

    k = tl.arange(0, Z.K)
    within = tl.arange(0, Z.WIDTH)[None, :]
    v = tl.arange(0, Z.GROUPS)[:, None] * Z.GROUP + within  # groups are padded one by one
    channels = k, k < Z.DK, v, (within < Z.GROUP) & (v < Z.DV)
    q = query[0] + b * query[1] + g * query[2] + s * query[3]
    q = tl.load(q[:, None] + k[None, :], mask=(k < Z.DK)[None, :], other=0.0)
    allowed, step = None, None
    if mask is not None:
        allowed, step = mask[0] + b * mask[1] + g * mask[2] + s * mask[3], mask[4]
    rows = q, scale, s, allowed, step

    highest = tl.full((Z.ROWS,), -float("inf"), tl.float32)  # running maximum of the scores
    total = tl.full((Z.ROWS,), 0.0, tl.float32)  # running sum of exp(score - highest)
    sums = tl.full((Z.ROWS, Z.GROUPS * Z.WIDTH), 0.0, tl.float32)  # of exp(...) * value
    state = highest, total, sums
    first = tl.program_id(2) * share
    if head is not None:
        state = _read_tokens(state, rows, head, at, (first, share, F), 0, channels, Z)
        first -= tl.cdiv(F, Z.TILE)
    if middle is not None:
        span = first, share, N
        if Z.K_BITS == 0:
            state = _read_tokens(state, rows, middle, at, span, F, channels, Z)
        else:
            state = _read_blocks(state, rows, middle, at, span, F, skip, channels, Z)
        first -= tl.cdiv(N * Z.BLOCK, Z.STEP)
    column = F + N * Z.BLOCK - skip
    state = _read_tokens(state, rows, tail, at, (first, share, R), column, channels, Z)
    highest, total, sums = state

    total = tl.where(total == 0, 1.0, total)  # a row that sees nothing: zeros and -inf
    part = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    place = part.to(tl.int64) * (G * S) + row
    inside = row < G * S
    tl.store(lse + place, highest + tl.log(total), mask=inside)
    sums = tl.reshape(sums / total[:, None], (Z.ROWS, Z.GROUPS, Z.WIDTH))
    inside = inside[:, None, None] & channels[3][None, :, :]
    place = place[:, None, None] * Z.DV + v[None, :, :]
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _read_tokens(state, rows, tokens, at, span, column, channels, Z: tl.constexpr):
    """Steps first:first + share over n tokens as they came, of which token 0 is in `column`."""
    highest, total, sums = state
    q, scale = rows[0], rows[1]
    first, share, n = span
    k, k_real, v, v_real = channels
    end = tl.minimum((first + share) * Z.TILE, n)
    for start in range(tl.maximum(first, 0) * Z.TILE, end, Z.TILE):
        token = start + tl.arange(0, Z.TILE)
        inside = token < n
        keys = _of(tokens[0], at, token.to(tl.int64))[None, :] + k[:, None]
        keys = tl.load(keys, mask=k_real[:, None] & inside[None, :], other=0.0)
        scores = _dot(q, keys.to(q.dtype), tl.full((Z.ROWS, Z.TILE), 0.0, tl.float32)) * scale
        scores = _visible(scores, rows, column + token, inside, Z)
        values = _of(tokens[1], at, token.to(tl.int64))[:, None, None] + v[None, :, :]
        values = tl.load(values, mask=inside[:, None, None] & v_real[None, :, :], other=0.0)
        values = tl.reshape(values.to(q.dtype), (Z.TILE, Z.GROUPS * Z.WIDTH))
        highest, total, sums = _fold(highest, total, sums, scores, values)
    return highest, total, sums


@triton.jit
def _read_blocks(state, rows, blocks, at, span, column, skip, channels, Z: tl.constexpr):
    """Steps first:first + share over n blocks, of which token `skip` is in `column`.

    Bytes of the next step are fetched while those of this one are worked on.
    """
    highest, total, sums = state
    q, scale = rows[0], rows[1]
    first, share, n = span
    end = tl.minimum(first + share, n * (Z.BLOCK // Z.STEP))
    first, last = tl.maximum(first, 0), tl.maximum(end - 1, 0)
    keys = _load_keys(blocks, at, tl.minimum(first, last), channels, Z)
    values = _load_values(blocks, at, tl.minimum(first, last), channels, Z)
    for i in tl.range(first, end, num_stages=1):
        codes, k_scale, k_zero = keys
        keys = _load_keys(blocks, at, tl.minimum(i + 1, last), channels, Z)
        # q . (code * scale + zero) = (q * scale) . code + q . zero: no factor depends on t
        x = q.to(tl.float32) * scale
        constant = tl.sum(x * k_zero.to(tl.float32)[None, :], 1)
        x *= k_scale.to(tl.float32)[None, :]
        codes = _unpack(codes, tl.arange(0, 8 // Z.K_BITS)[None, :, None], Z.K_BITS)
        codes = tl.reshape(codes, (Z.K, Z.RUNS * Z.PAD))
        scores = _dot_codes(x, codes, q.dtype) + constant[:, None]
        block, token, held = _place(i, Z.RUNS, Z)
        token += block.to(tl.int32) * Z.BLOCK - skip
        scores = _visible(scores, rows, column + token, held & (token >= 0), Z)

        codes, v_scale, v_zero = values
        values = _load_values(blocks, at, tl.minimum(i + 1, last), channels, Z)
        codes = _unpack(codes, tl.arange(0, 8 // Z.V_BITS)[:, None, None, None], Z.V_BITS)
        codes = codes * v_scale.to(tl.float32)[:, :, :, None] + v_zero.to(tl.float32)[:, :, :, None]
        codes = tl.reshape(codes.to(q.dtype), (Z.RUNS * Z.PAD, Z.GROUPS * Z.WIDTH))
        highest, total, sums = _fold(highest, total, sums, scores, codes)
    return highest, total, sums


@triton.jit
def _load_keys(blocks, at, i, channels, Z: tl.constexpr):
    """Key bytes [K, 1, n] of step i, scale and zero [K]."""
    k, real, _, _ = channels
    block, byte, held = _place(i, Z.RUNS * Z.K_BITS // 8, Z)
    codes = _of(blocks[0], at, block) + k[:, None, None] * (Z.BLOCK * Z.K_BITS // 8)
    inside = real[:, None, None] & held[None, None, :]
    codes = tl.load(codes + byte[None, None, :], mask=inside, other=0)
    scale = tl.load(_of(blocks[1], at, block) + k, mask=real, other=0.0)
    zero = tl.load(_of(blocks[2], at, block) + k, mask=real, other=0.0)
    return codes, scale, zero


@triton.jit
def _load_values(blocks, at, i, channels, Z: tl.constexpr):
    """Value bytes [1, n, GROUPS, WIDTH] of step i, scale and zero [8 / V_BITS, n, GROUPS]."""
    _, _, v, real = channels
    block, byte, held = _place(i, Z.RUNS * Z.V_BITS // 8, Z)
    codes = _of(blocks[3], at, block) + byte[None, :, None, None] * Z.DV + v[None, None, :, :]
    inside = held[None, :, None, None] & real[None, None, :, :]
    codes = tl.load(codes, mask=inside, other=0)
    token = tl.arange(0, 8 // Z.V_BITS)[:, None] * (Z.BLOCK * Z.V_BITS // 8) + byte[None, :]
    group = tl.arange(0, Z.GROUPS)[None, None, :]
    place = token[:, :, None] * (Z.DV // Z.GROUP) + group
    inside = held[None, :, None] & (group < Z.DV // Z.GROUP)
    scale = tl.load(_of(blocks[4], at, block) + place, mask=inside, other=0.0)
    zero = tl.load(_of(blocks[5], at, block) + place, mask=inside, other=0.0)
    return codes, scale, zero


@triton.jit
def _place(i, RUNS: tl.constexpr, Z: tl.constexpr):
    """The block of step i; the places in it of RUNS padded runs, and which of them are real.

    A byte holds tokens W = BLOCK * bits / 8 apart: W consecutive tokens are W bytes, shifted alike.
    A step is runs of consecutive tokens, BLOCK / Z.RUNS apart: all shifts of the same bytes for the
    narrower of keys and values. A place is a token, or the byte of a token.
    """
    RUN: tl.constexpr = Z.STEP // Z.RUNS
    j = tl.arange(0, RUNS * Z.PAD)
    start = i % (Z.BLOCK // Z.STEP) * RUN
    block = tl.cast(i // (Z.BLOCK // Z.STEP), tl.int64)
    return block, j // Z.PAD * (Z.BLOCK // Z.RUNS) + start + j % Z.PAD, j % Z.PAD < RUN


@triton.jit
def _unpack(packed, shift, BITS: tl.constexpr):
    """All codes that bytes hold, as float32: an axis of size 1 grows to that of `shift`."""
    return ((packed >> (shift * BITS).to(tl.uint8)) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def _dot_codes(x, codes, LIKE: tl.constexpr):
    """X [M, K] float32 @ codes [K, t] of at most 8 bits.

    Tensor cores multiply bfloat16: a code is one exactly, x the sum of two within 2**-17. (NaN may
    get lost here; it is in q . zero too.)
    """
    scores = tl.full((x.shape[0], codes.shape[1]), 0.0, tl.float32)
    if LIKE.is_fp32():
        scores = _dot(x, codes, scores)
    else:
        for _ in tl.static_range(2):
            part = (x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000  # rounded to 8 bits
            part = part.to(tl.float32, bitcast=True)
            scores = _dot(part.to(tl.bfloat16), codes.to(tl.bfloat16), scores)
            x -= part
    return scores


@triton.jit
def _dot(a, b, acc):
    """Acc + a [M, k] @ b [k, n], in float32."""
    if INTERPRETED:  # numpy has no bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _of(x, at, i):
    """Where tokens or blocks i of row and head `at` start."""
    return x[0] + at[0] * x[1] + at[1] * x[2] + i * x[3]


@triton.jit
def _visible(scores, rows, column, inside, Z: tl.constexpr):
    """Scores [M, t] of columns [t], with the mask: -inf where a row may not look."""
    _, _, s, allowed, step = rows
    if allowed is not None:
        place = allowed[:, None] + column.to(tl.int64)[None, :] * step
        mask = tl.load(place, mask=inside[None, :], other=0)
        if mask.dtype.is_int():
            scores = tl.where(mask != 0, scores, -float("inf"))
        else:
            scores += mask.to(tl.float32)
    if Z.CAUSAL:
        scores = tl.where(column[None, :] <= s[:, None], scores, -float("inf"))
    return tl.where(inside[None, :], scores, -float("inf"))


@triton.jit
def _fold(highest, total, sums, scores, values):
    """One step of the online softmax: scores [M, t] and values [t, V] join what was seen."""
    new = tl.maximum(highest, tl.max(scores, 1))
    base = tl.where(new == -float("inf"), 0.0, new)  # nothing seen yet: exp(-inf - 0) = 0, not NaN
    weights = tl.exp(scores - base[:, None])
    keep = tl.exp(highest - base)
    sums = _dot(weights.to(values.dtype), values, sums * keep[:, None])
    return new, total * keep + tl.sum(weights, 1), sums


@triton.jit(do_not_specialize=["splits"])
def _merge(
    found, found_lse, out, lse, splits, DV: tl.constexpr, V: tl.constexpr, SPLITS: tl.constexpr
):
    """One row of out [splits, rows, DV] and lse [splits, rows] -> out [rows, DV] and lse [rows]."""
    row = tl.program_id(0).to(tl.int64)
    split, v = tl.arange(0, SPLITS), tl.arange(0, V)
    place = split.to(tl.int64) * tl.num_programs(0) + row
    lses = tl.load(found_lse + place, mask=split < splits, other=-float("inf"))
    highest = tl.max(lses, 0)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    weights = tl.exp(lses - base)
    total = tl.sum(weights, 0)
    total = tl.where(total == 0, 1.0, total)
    inside = (split < splits)[:, None] & (v < DV)[None, :]
    sums = tl.load(found + place[:, None] * DV + v[None, :], mask=inside, other=0.0)
    sums = tl.sum(sums * weights[:, None], 0) / total
    tl.store(out + row * DV + v, sums.to(out.dtype.element_ty), mask=v < DV)
    tl.store(lse + row, highest + tl.log(total))
