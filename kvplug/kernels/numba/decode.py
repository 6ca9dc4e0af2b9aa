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
    load_bits,
    load_codes,
    load_halves,
    multiply_add,
    prefetch,
    put,
    spread,
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
    """Keys, channel by channel: [Dk, TILE]."""
    if not in_one_plane(codes.k_bits):
        _decode_key_planes(codes, b, h, start, n, Dk, out)
        return
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
                code + d * channel, run, part * bits, bits, half_at(s, d), half_at(z, d),
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
    """Values, token by token: [n, width]."""
    if not in_one_plane(codes.v_bits):
        _decode_value_planes(codes, b, h, start, n, Dv, width, out)
        return
    block, bits, groups, step = codes.block, codes.v_bits, codes.groups, codes.v_codes.row
    packed, size = block * bits // 8, Dv // groups
    t = 0
    while t < n:
        i, token = (start + t) // block, (start + t) % block
        part, byte = token // packed, token % packed
        run = min(packed - byte, n - t)
        code = block_at(codes.v_codes, b, h, i, 1) + byte * step
        for row in range(run):
            prefetch(code + codes.v_codes.block)
            for g in range(groups):
                scale, zero = _scale_of_value(codes, b, h, i, token + row, g)
                here = out + 4 * ((t + row) * width + g * size)
                _dequantize(code + g * size, size, part * bits, bits, scale, zero, here)
                if size % LANES:
                    _dequantize_rest(code + g * size, size, part * bits, bits, scale, zero, here)
            code += step
        t += run


@inlined
def _scale_of_value(codes, b, h, i, token, g):
    """Scale and zero of group g of a token's value in block i."""
    if codes.steps:
        scales = block_at(codes.v_scale, b, h, i, 1) + token * codes.v_scale.row
        scale = float_at(codes.steps, byte_at(scales, g))
        return scale, -scale * np.float32(((1 << codes.v_bits) - 1) / 2)
    scales = block_at(codes.v_scale, b, h, i, 2) + 2 * token * codes.v_scale.row
    zeros = block_at(codes.v_zero, b, h, i, 2) + 2 * token * codes.v_zero.row
    return half_at(scales, g), half_at(zeros, g)


@inlined
def in_one_plane(bits):
    """Whether codes of so many bits lie in one plane: 2, 4 and 8 do, 3, 5 and 6 in two."""
    return bits & (bits - 1) == 0


@inlined
def _low_bits(bits):
    """Bits of the first of two planes."""
    return 2 if bits == 3 else 4


@inlined
def _decode_key_planes(codes, b, h, start, n, Dk, out):
    """Keys whose codes are two planes, channel by channel: [Dk, TILE]."""
    block, bits, channel = codes.block, codes.k_bits, codes.k_codes.row
    low = _low_bits(bits)
    high, above, first = bits - low, np.float32(1 << low), block * low // 8
    aligned = first % LANES == 0 and (high == 1 or block * high // 8 % LANES == 0)
    t = 0
    while t < n:
        i, token = (start + t) // block, (start + t) % block
        run = min(block - token, n - t)
        whole = run - run % LANES if aligned and token % LANES == 0 else 0
        s, z = block_at(codes.k_scale, b, h, i, 2), block_at(codes.k_zero, b, h, i, 2)
        for d in range(Dk):
            lows = block_at(codes.k_codes, b, h, i, 1) + d * channel
            highs, here = lows + first, out + 4 * (d * TILE + t)
            prefetch(lows + codes.k_codes.block)
            scale, zero = half_at(s, d), half_at(z, d)
            for c in range(0, whole, LANES):
                code = _codes_from(lows, token + c, block, low)
                code = multiply_add(_codes_from(highs, token + c, block, high), spread(above), code)
                store(here, c, multiply_add(code, spread(scale), spread(zero)))
            for c in range(whole, run):
                at, shift = _place_of(token + c, block, low)
                code = (byte_at(lows, at) >> shift) & ((1 << low) - 1)
                at, shift = _place_of(token + c, block, high)
                code += ((byte_at(highs, at) >> shift) & ((1 << high) - 1)) << low
                put(here, c, np.float32(code) * scale + zero)
        t += run


@inlined
def _decode_value_planes(codes, b, h, start, n, Dv, width, out):
    """Values whose codes are two planes, token by token: [n, width]."""
    block, bits, groups, step = codes.block, codes.v_bits, codes.groups, codes.v_codes.row
    low, size = _low_bits(bits), Dv // groups
    high, above, first = bits - low, np.float32(1 << low), block * low // 8
    whole = size - size % LANES
    for t in range(n):
        i, token = (start + t) // block, (start + t) % block
        rows = block_at(codes.v_codes, b, h, i, 1)
        prefetch(rows + token * bits // 8 * step + codes.v_codes.block)
        at, low_shift = _place_of(token, block, low)
        lows = rows + at * step
        at, high_shift = _place_of(token, block, high)
        highs = rows + (first + at) * step
        low_keep, high_keep = (1 << low) - 1, (1 << high) - 1
        for g in range(groups):
            scale, zero = _scale_of_value(codes, b, h, i, token, g)
            here = out + 4 * (t * width + g * size)
            for d in range(0, whole, LANES):
                code = load_codes(lows, g * size + d, low_shift, low_keep)
                more = load_codes(highs, g * size + d, high_shift, high_keep)
                code = multiply_add(more, spread(above), code)
                store(here, d, multiply_add(code, spread(scale), spread(zero)))
            for d in range(whole, size):
                code = (byte_at(lows, g * size + d) >> low_shift) & low_keep
                code += ((byte_at(highs, g * size + d) >> high_shift) & high_keep) << low
                put(here, d, np.float32(code) * scale + zero)


@inlined
def _codes_from(plane, token, block, bits):
    """A vector of the codes of the tokens from `token` on of a plane."""
    if bits == 1:
        return load_bits(plane, token)
    at, shift = _place_of(token, block, bits)
    return load_codes(plane, at, shift, (1 << bits) - 1)


@inlined
def _place_of(token, block, bits):
    """Byte and shift of the code of a token in a plane."""
    if bits == 1:
        return token // 8, token % 8
    packed = block * bits // 8
    return token % packed, token // packed * bits


@inlined
def _dequantize(codes, n, shift, bits, scale, zero, out):
    """Floats out[:n] = codes[:n] * scale + zero, a code being `bits` of a byte from `shift` on.

    Whole vectors only. What is left has a loop apart: in this one it would cost half of the time.
    """
    keep = (1 << bits) - 1
    for i in range(0, n - n % LANES, LANES):
        code = load_codes(codes, i, shift, keep)
        store(out, i, multiply_add(code, spread(scale), spread(zero)))


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
    in_bytes = in_one_plane(codes.k_bits) and in_one_plane(codes.v_bits)
    in_keys = block % TILE == 0 and block * codes.k_bits // 8 % LANES == 0
    scales_lie_close = codes.v_scale.row == groups and codes.v_zero.row == groups
    return in_bytes and in_keys and Dv // groups % LANES == 0 and scales_lie_close


@inlined
def take_scales(codes, b, h, start, Dk, keys, values):
    """Scales, then zeros, of a tile as floats: [2, Dk] of its keys, [2, TILE, groups] of values."""
    block, groups = codes.block, codes.groups
    i, first, n = start // block, groups * (start % block), TILE * groups
    _widen(block_at(codes.k_scale, b, h, i, 2), Dk, keys)
    _widen(block_at(codes.k_zero, b, h, i, 2), Dk, keys + 4 * Dk)
    if codes.steps:
        bytes_, zero = block_at(codes.v_scale, b, h, i, 1) + first, ((1 << codes.v_bits) - 1) / 2
        for j in range(n):
            step = float_at(codes.steps, byte_at(bytes_, j))
            put(values, j, step)
            put(values, n + j, -step * np.float32(zero))
        return
    _widen(block_at(codes.v_scale, b, h, i, 2) + 2 * first, n, values)
    _widen(block_at(codes.v_zero, b, h, i, 2) + 2 * first, n, values + 4 * n)


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
