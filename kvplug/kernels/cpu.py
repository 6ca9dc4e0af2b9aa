"""`numba`: attention on the CPU that reads encoded blocks as they are stored.

Columns are taken in tiles of `TILE`, read by all query rows of their head: keys as [Dk, TILE] so
that scores run along tokens, values as [TILE, Dv]. Codes become floats in registers, between the
load and the products, where a tile is made of whole vectors; other tiles are decoded once, into
scratch that stays in the first-level cache. Work is split over batch, heads, row tiles and, where
these leave cores idle, the sequence; the splits are merged by their log-sum-exp (flash decoding).
"""

from __future__ import annotations

import logging
import math
import os
import threading
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import TYPE_CHECKING, ClassVar

import numba
import numpy as np
import torch
from numba import float64, intp, njit, prange, types
from numba.extending import register_jitable

from .base import Kernel
from .simd import (
    LANES,
    bfloat_at,
    byte_at,
    exp2,
    float_at,
    half_at,
    larger,
    largest,
    load,
    load_bfloats,
    load_codes,
    load_halves,
    multiply_add,
    prefetch,
    put,
    spread,
    spread_half,
    store,
    total,
    transpose,
    where_positive,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager

    from torch import Tensor

    from ..attention.stored import Stored
    from ..codecs.base import Codec

logger = logging.getLogger("kvplug")

TILE = 64  # columns at a time
ROWS = 32  # query rows at a time, of which two or three meet a tile
LOG2E = np.float32(math.log2(math.e))
LOWEST = np.float32(-np.inf)
ZERO, ONE = np.float32(0), np.float32(1)
CPU = torch.device("cpu")
FORMATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

inlined = njit(forceinline=True, error_model="numpy")


@dataclass(frozen=True)
class Numba(Kernel):
    """Compiled for this CPU by Numba on first use and kept on disk (`kvplug warmup`)."""

    name: ClassVar[str] = "numba"
    formats: ClassVar[tuple[str, ...]] = ("plain", "affine")

    def refuses(
        self,
        codec: Codec,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> str | None:
        if reason := super().refuses(codec):
            return reason
        if device is not None and device.type not in ("cpu", "meta"):
            return f"runs on the CPU, not on {device.type!r}"
        if dtype is not None and dtype not in FORMATS:
            return f"reads float32, float16 and bfloat16, not {dtype}"
        return None

    def reads_plain(self, S: int, T: int) -> bool:
        return S <= 8 and T >= 1024  # 0.6 of the time at 6,000 tokens; the same at 1,000

    def reads_pinned(self, S: int, T: int) -> bool:
        return S <= 8  # beside torch's own attention there is a copy of all columns to be saved

    def attend(
        self,
        query: Tensor,
        stored: Stored,
        mask: Tensor | None,
        scale: float | None,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor]:
        kernel = compiled()
        B, Q, S, Dk = query.shape
        H, Dv, T = stored.tail[0].shape[1], stored.tail[1].shape[-1], stored.length
        tokens = stored.block_count * stored.codec.block  # in blocks
        coded = tokens and stored.codec.format == "affine"
        if is_causal:
            mask = torch.ones(S, T, dtype=torch.bool, device=CPU).tril()
        if mask is not None:
            mask = mask if mask.dtype == torch.bool else mask.float()
            mask = _rows_contiguous(mask.expand(B, Q, S, T))
        query, tail = _rows_contiguous(query), [_rows_contiguous(x) for x in stored.tail]
        head = [_rows_contiguous(x) for x in stored.head or ()]
        out, lse = _floats_of(B, Q, S, Dv), _floats_of(B, Q, S)
        row_tiles = -(-(Q // H * S) // ROWS)
        workers = torch.get_num_threads()
        splits = _splits(B * H * row_tiles, -(-T // TILE), workers)
        width = -(-Dv // LANES) * LANES
        results = workers if splits == 1 else B * H * row_tiles * splits
        with ONE_AT_A_TIME, _threads(workers):
            room = _room(workers * _scratch(Dk, width) + results * _partial(width))
            kernel(
                (B, H, Q // H, S, Dk, Dv, width),
                (row_tiles, splits, workers),
                (FORMATS[query.dtype], *_address(query, 3)),
                Dk**-0.5 if scale is None else scale,
                _plain(head) if head else NOTHING,
                _plain(stored.blocks.values(), tokens, stored.skip)
                if tokens and not coded
                else NOTHING,
                _coded(stored, tokens) if coded else NO_CODES,
                _plain(tail),
                (0 if mask is None else 1 + mask.is_floating_point(), *_address(mask, 3)),
                (room, out.data_ptr(), lse.data_ptr()),
            )
        return out.to(query.dtype), lse

    def warmup(self) -> None:
        compiled()


@cache
def compiled() -> Callable:
    """The compiled kernel: from disk, or compiled now, which is said."""
    # the same code with and without threads, under two names: Numba's cache knows code by its name
    name, parallel = ("_attend_alone", False) if _forked else ("_attend", True)
    jit = njit(parallel=parallel, nogil=True, cache=True, error_model="numpy")
    kernel = jit(_named(name, _attend))
    threads = torch.get_num_threads()
    if not numba.config.DISABLE_JIT:
        notice = threading.Timer(2.0, logger.warning, (COMPILING,))
        notice.start()
        try:
            kernel.compile(SIGNATURE)
        finally:
            notice.cancel()
    if _forked:
        logger.warning(ALONE)
        return kernel
    numba.get_num_threads()  # starts Numba's pool, if compiling did not, ...
    torch.set_num_threads(threads)  # ... which sets the number of threads for all of OpenMP
    return kernel


def _named(name: str, function: FunctionType) -> FunctionType:
    """A copy of a function under another name."""
    code = function.__code__.replace(co_name=name, co_qualname=name)
    return FunctionType(code, function.__globals__)


COMPILING = (
    "kvplug: compiling the CPU kernel: some 40 seconds, once per machine; "
    "`kvplug warmup` does it ahead of time"
)
ALONE = (
    "kvplug: this process was forked from one whose CPU kernel had started its threads: it goes on "
    "with one thread. Processes started by 'spawn' or 'forkserver', or forked before, have all"
)

# Numba's own thread pool, its choice where OpenMP is not there, ends the process when two threads
# use it at once; and two calls that share the cores gain nothing
ONE_AT_A_TIME = threading.Lock()
AS_IT_IS = nullcontext()

_forked = False  # whether the threads of the pool were left behind in another process


def _after_fork() -> None:
    """Go on in a child without the threads that only its parent has.

    GNU OpenMP, the pool of Numba and of torch, does not start them anew: Numba would end the child,
    torch would wait for ever.
    """
    global ONE_AT_A_TIME, _forked
    ONE_AT_A_TIME = threading.Lock()  # a thread of the parent may hold the other
    if compiled.cache_info().currsize:
        _forked = True
        compiled.cache_clear()
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _threads(n: int) -> AbstractContextManager[None]:
    """As many threads as torch uses: its OpenMP pool is Numba's too, and keeps its size."""
    return AS_IT_IS if _forked or n == numba.get_num_threads() else _set_threads(n)


@contextmanager
def _set_threads(n: int) -> Iterator[None]:
    before = numba.get_num_threads()
    numba.set_num_threads(min(n, numba.config.NUMBA_NUM_THREADS))
    try:
        yield
    finally:
        numba.set_num_threads(before)


def _splits(groups: int, tiles: int, workers: int) -> int:
    """Into how many parts to cut the sequence, so that every worker has as much to do."""
    for n in range(1, min(workers, tiles) + 1):
        if groups * n % workers == 0 or groups * n >= 8 * workers:
            return n
    return max(1, min(workers, tiles))


_rooms: list[Tensor] = []  # the scratch of all calls, one after the other


def _room(floats: int) -> int:
    """The address of so much scratch; kept, so that a decode step allocates its output only."""
    if not _rooms or _rooms[0].numel() < floats:
        _rooms[:] = [_floats_of(floats)]
    return _rooms[0].data_ptr()


def _floats_of(*shape: int) -> Tensor:
    """Room for the compiled code, whatever dtype and device are torch's defaults."""
    return torch.empty(shape, dtype=torch.float32, device=CPU)


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _address(x: Tensor | None, axes: int) -> tuple[int, ...]:
    """Address, and strides of the first axes; the last axis is contiguous."""
    if x is None:
        return (0,) * (axes + 1)
    return (x.data_ptr(), *x.stride()[:axes])


def _plain(pair: Iterable[Tensor], count: int | None = None, skip: int = 0) -> tuple[int, ...]:
    """Tokens, those skipped, format; then keys and values: address, strides of B, H and token."""
    keys, values = pair
    k, v = _address(keys, keys.dim()), _address(values, values.dim())
    n = keys.shape[2] if count is None else count
    return (n, skip, FORMATS[keys.dtype], *k[:3], k[-2], *v[:3], v[-2])


# the tensors of `affine`, and how many of their axes have strides that the kernel needs
AXES = {"k_codes": 4, "k_scale": 3, "k_zero": 3, "v_codes": 4, "v_scale": 4, "v_zero": 4}


def _coded(stored: Stored, count: int) -> tuple[int, ...]:
    """Tokens, those skipped, block, bits, groups per value; then the six tensors of `affine`."""
    codec, data = stored.codec, stored.blocks
    numbers = [count, stored.skip, codec.block, codec.k_bits, codec.v_bits]
    numbers.append(data["v_scale"].shape[-1])
    for name, axes in AXES.items():
        numbers += _address(data[name], axes)
    return tuple(numbers)


NOTHING, NO_CODES = (0,) * 11, (0,) * 34
SIGNATURE = tuple(
    float64 if n is None else types.UniTuple(intp, n) for n in (7, 3, 5, None, 11, 11, 34, 11, 5, 3)
)


# --- compiled. Addresses, sizes and strides are integers; strides count numbers, not bytes.


@register_jitable
def _scratch(Dk, width):
    """Floats that a worker needs: a tile of keys and of values, its query rows, their scores."""
    return TILE * (Dk + width) + ROWS * (Dk + TILE)


@register_jitable
def _partial(width):
    """Floats that a task leaves: running maximum, sum and output of each row."""
    return ROWS * (2 + width)


def _attend(shape, plan, query, scale, head, plain, coded, tail, mask, room_out_lse):
    """All of one call; `Numba.attend` says what the tuples hold."""
    B, H, _, _, Dk, _, width = shape
    row_tiles, splits, workers = plan
    room, out, lse = room_out_lse
    partials = room + 4 * workers * _scratch(Dk, width)
    step = 4 * _partial(width)
    groups = B * H * row_tiles
    tasks = groups * splits
    for worker in prange(workers):
        scratch = room + 4 * worker * _scratch(Dk, width)
        for task in range(worker * tasks // workers, (worker + 1) * tasks // workers):
            group, split = task // splits, task % splits
            results = partials + step * (worker if splits == 1 else task)
            _attend_split(
                shape, row_tiles, group, splits, split,
                query, scale, head, plain, coded, tail, mask, scratch, results,
            )  # fmt: skip
            if splits == 1:
                _merge(results, 1, shape, row_tiles, group, out, lse)
    if splits > 1:
        for group in range(groups):
            results = partials + step * group * splits
            _merge(results, splits, shape, row_tiles, group, out, lse)


@inlined
def _rows(shape, row_tiles, group):
    """Batch, head, first row and number of rows of a group: rows are the G * S of a head."""
    _, H, G, S, _, _, _ = shape
    first = group % row_tiles * ROWS
    return group // row_tiles // H, group // row_tiles % H, first, min(ROWS, G * S - first)


@inlined
def _attend_split(
    shape, row_tiles, group, splits, split,
    query, scale, head, plain, coded, tail, mask, scratch, results,
):  # fmt: skip
    """Online softmax (arXiv:1805.02867) of a group of rows over its share of the tiles."""
    _, _, G, S, Dk, Dv, width = shape
    b, h, first, rows = _rows(shape, row_tiles, group)
    keys = scratch
    values = keys + 4 * TILE * Dk
    queries = values + 4 * TILE * width
    scores = queries + 4 * ROWS * Dk
    highest, sums, sides = results, results + 4 * ROWS, results + 8 * ROWS
    for r in range(max(rows, 2)):
        put(highest, r, LOWEST)
        put(sums, r, ZERO)
        for d in range(0, width, LANES):
            store(sides, r * width + d, spread(ZERO))
    _take_queries(query, scale, b, h, G, S, first, rows, Dk, queries)

    of_head, of_plain = _tiles(head[0], head[1]), _tiles(plain[0], plain[1])
    of_coded, of_tail = _tiles(coded[0], coded[1]), _tiles(tail[0], tail[1])
    before_coded = of_head + of_plain
    before_tail = before_coded + of_coded
    tiles = before_tail + of_tail
    # many rows: a tile is decoded faster once than with every two of them
    in_vectors = of_coded > 0 and rows <= ROWS // 2 and _in_vectors(coded, Dv)
    for tile in range(split * tiles // splits, (split + 1) * tiles // splits):
        # from which of its source's tokens on, how many, and at which column; then where its values
        # are, and how many numbers from one to the next, if not in codes
        in_codes = False
        if before_coded <= tile < before_tail:
            start, n, column = _span(coded[0], coded[1], tile - before_coded)
            column += head[0]
            in_codes = in_vectors and n == TILE and start % TILE == 0
            if in_codes:
                _take_scales(coded, b, h, start, Dk, keys, values)
            else:
                _decode_keys(coded, b, h, start, n, Dk, keys)
                _decode_values(coded, b, h, start, n, Dv, width, values)
            found, step = values, width
        else:
            if tile < of_head:
                source, earlier, columns = head, 0, 0
            elif tile < before_coded:
                source, earlier, columns = plain, of_head, head[0]
            else:
                source, earlier = tail, before_tail
                columns = head[0] + plain[0] - plain[1] + coded[0] - coded[1]
            start, n, column = _span(source[0], source[1], tile - earlier)
            column += columns
            found, step = _take(source, b, h, start, n, Dk, Dv, width, keys, values)
        r = 0
        while r < rows:
            some = 3 if (rows - r) % 2 and rows - r > 1 else 2  # two by two; first three if odd
            s = scores + 4 * r * TILE
            for c in range(0, some * TILE, LANES):
                store(s, c, spread(ZERO))
            q = queries + 4 * r * Dk
            if in_codes:
                codes = _key_codes(coded, b, h, start, keys, Dk)
                _add_products(q, Dk, some, Dk, codes, TILE, s)
            else:
                _add_products(q, Dk, some, Dk, _floats(keys, TILE), TILE, s)
            for i in range(r, min(r + some, rows)):
                s = scores + 4 * i * TILE
                _hide(mask, b, h * G + (first + i) // S, (first + i) % S, column, n, s)
                _softmax(s, highest, sums, i, sides + 4 * i * width, width)
            s, side = scores + 4 * r * TILE, sides + 4 * r * width
            if in_codes:
                _add_coded_values(coded, b, h, start, s, some, Dv, values, side)
            else:
                _add_products(s, TILE, some, n, _floats(found, step), width, side)
            r += some


@inlined
def _tiles(count, skip):
    """Tiles that `count` tokens make, the first `skip` hidden; tiles start at multiples of TILE."""
    return (count + TILE - 1) // TILE - skip // TILE


@inlined
def _span(count, skip, tile):
    """First token of a tile, how many, and how many visible ones are before it."""
    aligned = (skip // TILE + tile) * TILE
    start = max(skip, aligned)
    return start, min(count, aligned + TILE) - start, start - skip


@inlined
def _take_queries(query, scale, b, h, G, S, first, rows, Dk, out):
    """Scaled rows [rows, Dk] of the head; a row of zeros beside a single one."""
    form, base, by_batch, by_head, by_token = query
    for r in range(rows):
        start = b * by_batch + (h * G + (first + r) // S) * by_head + (first + r) % S * by_token
        for d in range(Dk):
            put(out, r * Dk + d, np.float32(_number(base, start + d, form) * scale))
    if rows == 1:
        for d in range(Dk):
            put(out, Dk + d, ZERO)


@inlined
def _take(source, b, h, start, n, Dk, Dv, width, keys, values):
    """Plain tokens: keys turned to [Dk, TILE]; where the values are, and numbers between them.

    Floats are read where they are stored, others are made floats in `values`.
    """
    form, k_base, k_batch, k_head, k_token = source[2:7]
    v_base, v_batch, v_head, v_token = source[7:]
    size = 4 if form == 0 else 2
    k_rows = k_base + size * (b * k_batch + h * k_head + start * k_token)
    v_rows = v_base + size * (b * v_batch + h * v_head + start * v_token)
    _prefetch(k_rows, size * k_token, n, size * Dk)
    most = Dk if form == 0 else width  # the room of the values holds a part of the keys
    for part in range(0, Dk, most):
        m, rows, step = min(most, Dk - part), k_rows, k_token
        if form != 0:
            _copy(k_rows + size * part, k_token, n, m, form, values, width)
            rows, step = values, width
        _turn(rows, step, n, m, keys + 4 * part * TILE)
    _prefetch(v_rows, size * v_token, n, size * Dv)
    if form == 0 and Dv == width:
        return v_rows, v_token
    _copy(v_rows, v_token, n, Dv, form, values, width)
    return values, width


@inlined
def _prefetch(rows, step, n, size):
    """As many rows of `size` bytes of the tile after this one, `step` bytes apart."""
    for t in range(TILE, TILE + n):
        for i in range(0, size, 64):
            prefetch(rows + t * step + i)


@inlined
def _copy(rows, step, n, m, form, out, width):
    """Numbers [n, m], rows `step` apart -> floats [n, width]."""
    whole = m - m % LANES
    size = 4 if form == 0 else 2
    for t in range(n):
        row = rows + size * t * step
        for d in range(0, whole, LANES):
            if form == 0:
                store(out, t * width + d, load(row, d))
            elif form == 1:
                store(out, t * width + d, load_halves(row, d))
            else:
                store(out, t * width + d, load_bfloats(row, d))
        for d in range(whole, m):
            put(out, t * width + d, _number(row, d, form))


@inlined
def _turn(rows, step, n, m, out):
    """Floats [n, m], rows `step` apart -> [m, TILE]."""
    n_whole, m_whole = n - n % LANES, m - m % LANES
    for t in range(0, n_whole, LANES):
        for d in range(0, m_whole, LANES):
            transpose(rows + 4 * (t * step + d), step, out + 4 * (d * TILE + t), TILE)
    for t in range(n):
        for d in range(m_whole if t < n_whole else 0, m):
            put(out, d * TILE + t, float_at(rows, t * step + d))


@inlined
def _decode_keys(coded, b, h, start, n, Dk, out):
    """Keys of `affine`, channel by channel: [Dk, TILE]."""
    block, bits = coded[2], coded[3]
    codes, codes_batch, codes_head, codes_block, codes_channel = coded[6:11]
    packed = block * bits // 8  # bytes of a channel: byte i has the tokens i, i + packed, ...
    t = 0
    while t < n:
        i, token = (start + t) // block, (start + t) % block
        part, byte = token // packed, token % packed
        run = min(packed - byte, n - t)
        code = codes + b * codes_batch + h * codes_head + i * codes_block + byte
        s, z = _halves(coded[11:15], b, h, i), _halves(coded[15:19], b, h, i)
        for d in range(Dk):
            prefetch(code + d * codes_channel + codes_block)
            _dequantize(
                code + d * codes_channel, run, part * bits, bits, s + 2 * d, z + 2 * d,
                out + 4 * (d * TILE + t),
            )  # fmt: skip
        if run % LANES:
            for d in range(Dk):
                _dequantize_rest(
                    code + d * codes_channel, run, part * bits, bits, half_at(s, d), half_at(z, d),
                    out + 4 * (d * TILE + t),
                )  # fmt: skip
        t += run


@inlined
def _decode_values(coded, b, h, start, n, Dv, width, out):
    """Values of `affine`, token by token: [n, width]."""
    block, bits, groups = coded[2], coded[4], coded[5]
    codes, codes_batch, codes_head, codes_block, codes_row = coded[19:24]
    scale_token, zero_token = coded[28], coded[33]
    packed, size = block * bits // 8, Dv // groups
    t = 0
    while t < n:
        i, token = (start + t) // block, (start + t) % block
        part, byte = token // packed, token % packed
        run = min(packed - byte, n - t)
        code = codes + b * codes_batch + h * codes_head + i * codes_block + byte * codes_row
        s = _halves(coded[24:28], b, h, i) + 2 * token * scale_token
        z = _halves(coded[29:33], b, h, i) + 2 * token * zero_token
        for row in range(t, t + run):
            prefetch(code + codes_block)
            for g in range(groups):
                _dequantize(
                    code + g * size, size, part * bits, bits, s + 2 * g, z + 2 * g,
                    out + 4 * (row * width + g * size),
                )  # fmt: skip
            if size % LANES:
                for g in range(groups):
                    _dequantize_rest(
                        code + g * size, size, part * bits, bits, half_at(s, g), half_at(z, g),
                        out + 4 * (row * width + g * size),
                    )  # fmt: skip
            code, s, z = code + codes_row, s + 2 * scale_token, z + 2 * zero_token
        t += run


@inlined
def _halves(tensor, b, h, i):
    """Address of block i of a head in float16 numbers: their address, strides of B, H and N."""
    base, by_batch, by_head, by_block = tensor
    return base + 2 * (b * by_batch + h * by_head + i * by_block)


@inlined
def _dequantize(codes, n, shift, bits, scale, zero, out):
    """Floats out[:n] = codes[:n] * scale + zero, a code being `bits` of a byte from `shift` on.

    Whole vectors only. What is left has a loop apart: in this one it would cost half of the time.
    """
    keep = (1 << bits) - 1
    scales, zeros = spread_half(scale), spread_half(zero)
    for i in range(0, n - n % LANES, LANES):
        store(out, i, multiply_add(load_codes(codes, i, shift, keep), scales, zeros))


@inlined
def _dequantize_rest(codes, n, shift, bits, scale, zero, out):
    """The last `n % LANES` of them."""
    keep = (1 << bits) - 1
    for i in range(n - n % LANES, n):
        put(out, i, np.float32((byte_at(codes, i) >> shift) & keep) * scale + zero)


@inlined
def _in_vectors(coded, Dv):
    """Whether tiles of codes are vectors that each have one shift, and one scale per row."""
    block, k_bits, _, groups = coded[2:6]
    scale_token, zero_token = coded[28], coded[33]
    whole = block % TILE == 0 and block * k_bits // 8 % LANES == 0 and Dv // groups % LANES == 0
    return whole and scale_token == groups and zero_token == groups


@inlined
def _take_scales(coded, b, h, start, Dk, keys, values):
    """Scales, then zeros, of a tile as floats: [2, Dk] of its keys, [2, TILE, groups] of values."""
    block, groups = coded[2], coded[5]
    i, first, n = start // block, 2 * groups * (start % block), TILE * groups
    _widen(_halves(coded[11:15], b, h, i), Dk, keys)
    _widen(_halves(coded[15:19], b, h, i), Dk, keys + 4 * Dk)
    _widen(_halves(coded[24:28], b, h, i) + first, n, values)
    _widen(_halves(coded[29:33], b, h, i) + first, n, values + 4 * n)


@inlined
def _widen(halves, n, out):
    """Numbers of float16 -> floats."""
    whole = n - n % LANES
    for i in range(0, whole, LANES):
        store(out, i, load_halves(halves, i))
    for i in range(whole, n):
        put(out, i, half_at(halves, i))


# A matrix, for the products below, in numbers: address; bytes from a row to the next, and to the
# one to prefetch; bytes of a column; columns after which the same bytes come again, shifted by
# `bits`; where among those its first column is, and the shift there; bits of a code, 0 for floats;
# addresses of scales and zeros, bytes from those of a row to the next, columns that share them.
ENDLESS = 1 << 30


@inlined
def _floats(address, step):
    """A matrix of floats, rows `step` floats apart."""
    return address, 4 * step, 0, 4, ENDLESS, 0, 0, 0, 0, 0, 0, ENDLESS


@inlined
def _key_codes(coded, b, h, start, scales, Dk):
    """The matrix [Dk, TILE] of a tile's keys."""
    block, bits = coded[2], coded[3]
    codes, codes_batch, codes_head, codes_block, codes_channel = coded[6:11]
    address = codes + b * codes_batch + h * codes_head + start // block * codes_block
    zeros, wrap = scales + 4 * Dk, block * bits // 8
    return (
        address, codes_channel, codes_block, 1, wrap, start % block, 0, bits,
        scales, zeros, 4, ENDLESS,
    )  # fmt: skip


@inlined
def _add_coded_values(coded, b, h, start, x, rows, Dv, scales, out):
    """out[rows, Dv] += x[rows, TILE] @ values of a tile; bytes hold tokens `packed` apart."""
    block, bits, groups = coded[2], coded[4], coded[5]
    codes, codes_batch, codes_head, codes_block, codes_row = coded[19:24]
    address = codes + b * codes_batch + h * codes_head + start // block * codes_block
    zeros, packed = scales + 4 * TILE * groups, block * bits // 8
    t = 0
    while t < TILE:
        part, byte = (start + t) % block // packed, (start + t) % block % packed
        n, scale = min(packed - byte, TILE - t), 4 * t * groups
        matrix = (
            address + byte * codes_row, codes_row, codes_block, 1, ENDLESS, 0, part * bits, bits,
            scales + scale, zeros + scale, 4 * groups, Dv // groups,
        )  # fmt: skip
        _add_products(x + 4 * t, TILE, rows, n, matrix, Dv, out)
        t += n


@inlined
def _place(matrix, c):
    """Of the vector of columns from c on: bytes from its row's address and scale, and its shift."""
    _, _, _, size, wrap, first, shift, bits, _, _, _, group = matrix
    return (first + c) % wrap * size, c // group * 4, shift + (first + c) // wrap * bits


@inlined
def _vector(matrix, i, at, scale, shift):
    """The floats of row i at a place."""
    address, step, _, _, _, _, _, bits, scales, zeros, next_scale, _ = matrix
    row = address + i * step + at
    if bits == 0:
        return load(row, 0)
    scale += i * next_scale
    codes = load_codes(row, 0, shift, (1 << bits) - 1)
    return multiply_add(
        codes, spread(float_at(scales + scale, 0)), spread(float_at(zeros + scale, 0))
    )


@inlined
def _add_products(x, x_step, rows, n, matrix, columns, out):
    """out[rows, columns] += x[rows, :n] @ matrix[:n, columns], for two or three rows."""
    done = 0
    while done + 4 * LANES <= columns:
        if rows == 3:
            _add_three(x, x_step, n, matrix, done, columns, out + 4 * done)
        else:
            _add_two(x, x_step, n, matrix, done, columns, out + 4 * done)
        done += 4 * LANES
    for c in range(done, columns, LANES):
        at, scale, shift = _place(matrix, c)
        for r in range(rows):
            a = load(out, r * columns + c)
            for i in range(n):
                b = spread(float_at(x, r * x_step + i))
                a = multiply_add(b, _vector(matrix, i, at, scale, shift), a)
            store(out, r * columns + c, a)


@inlined
def _add_two(x, x_step, n, matrix, c, columns, out):
    """Two rows by the four vectors from column c on, sums in eight registers."""
    at0, scale0, shift0 = _place(matrix, c)
    at1, scale1, shift1 = _place(matrix, c + LANES)
    at2, scale2, shift2 = _place(matrix, c + 2 * LANES)
    at3, scale3, shift3 = _place(matrix, c + 3 * LANES)
    step, ahead = matrix[1:3]
    y, out1 = x + 4 * x_step, out + 4 * columns
    a0, a1 = load(out, 0), load(out, LANES)
    a2, a3 = load(out, 2 * LANES), load(out, 3 * LANES)
    b0, b1 = load(out1, 0), load(out1, LANES)
    b2, b3 = load(out1, 2 * LANES), load(out1, 3 * LANES)
    for i in range(n):
        if ahead:
            prefetch(matrix[0] + at0 + i * step + ahead)
        m0 = _vector(matrix, i, at0, scale0, shift0)
        m1 = _vector(matrix, i, at1, scale1, shift1)
        m2 = _vector(matrix, i, at2, scale2, shift2)
        m3 = _vector(matrix, i, at3, scale3, shift3)
        a, b = spread(float_at(x, i)), spread(float_at(y, i))
        a0, a1 = multiply_add(a, m0, a0), multiply_add(a, m1, a1)
        a2, a3 = multiply_add(a, m2, a2), multiply_add(a, m3, a3)
        b0, b1 = multiply_add(b, m0, b0), multiply_add(b, m1, b1)
        b2, b3 = multiply_add(b, m2, b2), multiply_add(b, m3, b3)
    store(out, 0, a0)
    store(out, LANES, a1)
    store(out, 2 * LANES, a2)
    store(out, 3 * LANES, a3)
    store(out1, 0, b0)
    store(out1, LANES, b1)
    store(out1, 2 * LANES, b2)
    store(out1, 3 * LANES, b3)


@inlined
def _add_three(x, x_step, n, matrix, c, columns, out):
    """Three rows by the four vectors from column c on, sums in twelve registers."""
    at0, scale0, shift0 = _place(matrix, c)
    at1, scale1, shift1 = _place(matrix, c + LANES)
    at2, scale2, shift2 = _place(matrix, c + 2 * LANES)
    at3, scale3, shift3 = _place(matrix, c + 3 * LANES)
    step, ahead = matrix[1:3]
    y, z = x + 4 * x_step, x + 8 * x_step
    out1, out2 = out + 4 * columns, out + 8 * columns
    a0, a1 = load(out, 0), load(out, LANES)
    a2, a3 = load(out, 2 * LANES), load(out, 3 * LANES)
    b0, b1 = load(out1, 0), load(out1, LANES)
    b2, b3 = load(out1, 2 * LANES), load(out1, 3 * LANES)
    d0, d1 = load(out2, 0), load(out2, LANES)
    d2, d3 = load(out2, 2 * LANES), load(out2, 3 * LANES)
    for i in range(n):
        if ahead:
            prefetch(matrix[0] + at0 + i * step + ahead)
        m0 = _vector(matrix, i, at0, scale0, shift0)
        m1 = _vector(matrix, i, at1, scale1, shift1)
        m2 = _vector(matrix, i, at2, scale2, shift2)
        m3 = _vector(matrix, i, at3, scale3, shift3)
        a, b, d = spread(float_at(x, i)), spread(float_at(y, i)), spread(float_at(z, i))
        a0, a1 = multiply_add(a, m0, a0), multiply_add(a, m1, a1)
        a2, a3 = multiply_add(a, m2, a2), multiply_add(a, m3, a3)
        b0, b1 = multiply_add(b, m0, b0), multiply_add(b, m1, b1)
        b2, b3 = multiply_add(b, m2, b2), multiply_add(b, m3, b3)
        d0, d1 = multiply_add(d, m0, d0), multiply_add(d, m1, d1)
        d2, d3 = multiply_add(d, m2, d2), multiply_add(d, m3, d3)
    store(out, 0, a0)
    store(out, LANES, a1)
    store(out, 2 * LANES, a2)
    store(out, 3 * LANES, a3)
    store(out1, 0, b0)
    store(out1, LANES, b1)
    store(out1, 2 * LANES, b2)
    store(out1, 3 * LANES, b3)
    store(out2, 0, d0)
    store(out2, LANES, d1)
    store(out2, 2 * LANES, d2)
    store(out2, 3 * LANES, d3)


@inlined
def _hide(mask, b, q, s, column, n, scores):
    """Apply the mask to the scores of n columns; those after them in the tile are hidden."""
    kind, base, by_batch, by_head, by_row = mask
    row = b * by_batch + q * by_head + s * by_row + column
    if kind == 1:
        row += base
        whole = n - n % LANES
        for i in range(0, whole, LANES):
            seen = load_codes(row, i, 0, 255)
            store(scores, i, where_positive(seen, load(scores, i), spread(LOWEST)))
        for i in range(whole, n):
            if byte_at(row, i) == 0:
                put(scores, i, LOWEST)
    elif kind == 2:
        for i in range(n):
            put(scores, i, float_at(scores, i) + float_at(base, row + i))
    for i in range(n, TILE):
        put(scores, i, LOWEST)


@inlined
def _softmax(scores, highest, sums, r, side, width):
    """Scores of a tile -> weights, relative to the row's new maximum; what it has is rescaled."""
    best = load(scores, 0)
    for c in range(LANES, TILE, LANES):
        best = larger(load(scores, c), best)
    old, new = float_at(highest, r), largest(best)
    if new > old:
        shrink = np.float32(math.exp(old - new))
        put(highest, r, new)
        put(sums, r, float_at(sums, r) * shrink)
        for d in range(0, width, LANES):
            store(side, d, multiply_add(load(side, d), spread(shrink), spread(ZERO)))
    base = max(old, new)
    if base == LOWEST:  # nothing visible yet: exp(-inf - 0) = 0, not NaN
        base = ZERO
    added = spread(ZERO)
    for c in range(0, TILE, LANES):
        above = multiply_add(load(scores, c), spread(ONE), spread(-base))
        weight = exp2(multiply_add(above, spread(LOG2E), spread(ZERO)))
        store(scores, c, weight)
        added = multiply_add(weight, spread(ONE), added)
    put(sums, r, float_at(sums, r) + total(added))


@inlined
def _merge(results, splits, shape, row_tiles, group, out, lse):
    """Results of all splits of a group -> its rows of the output and of the log-sum-exp."""
    _, H, G, S, _, Dv, width = shape
    b, h, first, rows = _rows(shape, row_tiles, group)
    row = (b * H + h) * G * S + first
    out, lse = out + 4 * row * Dv, lse + 4 * row
    step = 4 * _partial(width)
    for r in range(rows):
        highest = LOWEST
        for split in range(splits):
            highest = max(highest, float_at(results + split * step, r))
        whole = ZERO
        for d in range(Dv):
            put(out, r * Dv + d, ZERO)
        for split in range(splits):
            here = results + split * step
            if float_at(here, r) > LOWEST:
                share = np.float32(math.exp(float_at(here, r) - highest))
                whole += share * float_at(here + 4 * ROWS, r)
                side = here + 8 * ROWS + 4 * r * width
                for d in range(Dv):
                    put(out, r * Dv + d, float_at(out, r * Dv + d) + share * float_at(side, d))
        if whole == 0:
            put(lse, r, LOWEST)
            continue
        for d in range(Dv):
            put(out, r * Dv + d, float_at(out, r * Dv + d) / whole)
        put(lse, r, highest + np.float32(math.log(whole)))


@inlined
def _number(address, i, form):
    """Number i at `address`, of a format of FORMATS."""
    if form == 0:
        return float_at(address, i)
    if form == 1:
        return half_at(address, i)
    return bfloat_at(address, i)
