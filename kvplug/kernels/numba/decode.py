"""Tiles of what is stored, as floats in scratch: plain tokens, and codes that fill no vectors."""

import numpy as np

from .simd import (
    LANES,
    bfloat_at,
    byte_at,
    float_at,
    half_at,
    load,
    load_bfloats,
    load_codes,
    load_halves,
    multiply_add,
    prefetch,
    put,
    spread_half,
    store,
    transpose,
)
from .tiles import TILE, inlined


@inlined
def row_at(rows, b, h, i, size):
    """Address of row i of a head in `Rows`, whose numbers have `size` bytes."""
    return rows.address + size * (b * rows.batch + h * rows.head + i * rows.row)


@inlined
def block_at(blocks, b, h, i, size):
    """Address of block i of a head in `Blocks`, whose numbers have `size` bytes."""
    return blocks.address + size * (b * blocks.batch + h * blocks.head + i * blocks.block)


@inlined
def take(source, b, h, start, n, Dk, Dv, width, keys, values):
    """Plain tokens: keys turned to [Dk, TILE]; where the values are, and numbers between them.

    Floats are read where they are stored, others are made floats in `values`.
    """
    form, k_token, v_token = source.number, source.keys.row, source.values.row
    size = 4 if form == 0 else 2
    k_rows = row_at(source.keys, b, h, start, size)
    v_rows = row_at(source.values, b, h, start, size)
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
            put(out, t * width + d, number(row, d, form))


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
def decode_keys(codes, b, h, start, n, Dk, out):
    """Keys of `affine`, channel by channel: [Dk, TILE]."""
    block, bits, channel = codes.block, codes.k_bits, codes.k_codes.row
    packed = block * bits // 8  # bytes of a channel: byte i has the tokens i, i + packed, ...
    t = 0
    while t < n:
        i, token = (start + t) // block, (start + t) % block
        part, byte = token // packed, token % packed
        run = min(packed - byte, n - t)
        code = block_at(codes.k_codes, b, h, i, 1) + byte
        s, z = block_at(codes.k_scale, b, h, i, 2), block_at(codes.k_zero, b, h, i, 2)
        for d in range(Dk):
            prefetch(code + d * channel + codes.k_codes.block)
            _dequantize(
                code + d * channel, run, part * bits, bits, s + 2 * d, z + 2 * d,
                out + 4 * (d * TILE + t),
            )  # fmt: skip
        if run % LANES:
            for d in range(Dk):
                _dequantize_rest(
                    code + d * channel, run, part * bits, bits, half_at(s, d), half_at(z, d),
                    out + 4 * (d * TILE + t),
                )  # fmt: skip
        t += run


@inlined
def decode_values(codes, b, h, start, n, Dv, width, out):
    """Values of `affine`, token by token: [n, width]."""
    block, bits, groups = codes.block, codes.v_bits, codes.groups
    step, scale_token, zero_token = codes.v_codes.row, codes.v_scale.row, codes.v_zero.row
    packed, size = block * bits // 8, Dv // groups
    t = 0
    while t < n:
        i, token = (start + t) // block, (start + t) % block
        part, byte = token // packed, token % packed
        run = min(packed - byte, n - t)
        code = block_at(codes.v_codes, b, h, i, 1) + byte * step
        s = block_at(codes.v_scale, b, h, i, 2) + 2 * token * scale_token
        z = block_at(codes.v_zero, b, h, i, 2) + 2 * token * zero_token
        for row in range(t, t + run):
            prefetch(code + codes.v_codes.block)
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
            code, s, z = code + step, s + 2 * scale_token, z + 2 * zero_token
        t += run


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
def in_vectors(codes, Dv):
    """Whether tiles of codes are vectors that each have one shift, and one scale per row."""
    block, groups = codes.block, codes.groups
    in_keys = block % TILE == 0 and block * codes.k_bits // 8 % LANES == 0
    scales_lie_close = codes.v_scale.row == groups and codes.v_zero.row == groups
    return in_keys and Dv // groups % LANES == 0 and scales_lie_close


@inlined
def take_scales(codes, b, h, start, Dk, keys, values):
    """Scales, then zeros, of a tile as floats: [2, Dk] of its keys, [2, TILE, groups] of values."""
    block, groups = codes.block, codes.groups
    i, first, n = start // block, 2 * groups * (start % block), TILE * groups
    _widen(block_at(codes.k_scale, b, h, i, 2), Dk, keys)
    _widen(block_at(codes.k_zero, b, h, i, 2), Dk, keys + 4 * Dk)
    _widen(block_at(codes.v_scale, b, h, i, 2) + first, n, values)
    _widen(block_at(codes.v_zero, b, h, i, 2) + first, n, values + 4 * n)


@inlined
def _widen(halves, n, out):
    """Numbers of float16 -> floats."""
    whole = n - n % LANES
    for i in range(0, whole, LANES):
        store(out, i, load_halves(halves, i))
    for i in range(whole, n):
        put(out, i, half_at(halves, i))


@inlined
def number(address, i, form):
    """Number i at `address`, of a format of NUMBERS."""
    if form == 0:
        return float_at(address, i)
    if form == 1:
        return half_at(address, i)
    return bfloat_at(address, i)
