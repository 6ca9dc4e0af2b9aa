"""Products of a few rows with a matrix, which may be codes: these become floats in registers."""

from typing import NamedTuple

from .decode import block_at
from .simd import (
    LANES,
    float_at,
    load,
    load_codes,
    multiply_add,
    prefetch,
    spread,
    store,
)
from .tiles import TILE, ZERO, inlined

ENDLESS = 1 << 30


class Matrix(NamedTuple):
    """A matrix in memory, of floats or of codes with a scale and a zero; sizes are bytes."""

    address: int
    row: int  # from a row to the next, ...
    ahead: int  # ... and to the one to prefetch
    column: int  # of one number
    wrap: int  # columns after which the same bytes come again, shifted by `bits`
    first: int  # where among those the first column is, ...
    shift: int  # ... and its shift
    bits: int  # of a code; 0: floats
    scales: int  # addresses
    zeros: int
    next_scale: int  # from the scale of a row to that of the next
    group: int  # columns that share a scale


@inlined
def floats(address, step):
    """A matrix of floats, rows `step` floats apart."""
    return Matrix(address, 4 * step, 0, 4, ENDLESS, 0, 0, 0, 0, 0, 0, ENDLESS)


@inlined
def key_codes(codes, b, h, start, scales, Dk):
    """The matrix [Dk, TILE] of a tile's keys."""
    block, bits = codes.block, codes.k_bits
    address = block_at(codes.k_codes, b, h, start // block, 1)
    zeros, wrap = scales + 4 * Dk, block * bits // 8
    return Matrix(
        address, codes.k_codes.row, codes.k_codes.block, 1, wrap, start % block, 0, bits,
        scales, zeros, 4, ENDLESS,
    )  # fmt: skip


@inlined
def add_coded_values(codes, b, h, start, x, rows, Dv, scales, out):
    """out[rows, Dv] += x[rows, TILE] @ values of a tile; bytes hold tokens `packed` apart."""
    block, bits, groups, step = codes.block, codes.v_bits, codes.groups, codes.v_codes.row
    address = block_at(codes.v_codes, b, h, start // block, 1)
    zeros, packed = scales + 4 * TILE * groups, block * bits // 8
    t = 0
    while t < TILE:
        part, byte = (start + t) % block // packed, (start + t) % block % packed
        n, scale = min(packed - byte, TILE - t), 4 * t * groups
        matrix = Matrix(
            address + byte * step, step, codes.v_codes.block, 1, ENDLESS, 0, part * bits, bits,
            scales + scale, zeros + scale, 4 * groups, Dv // groups,
        )  # fmt: skip
        add_products(x + 4 * t, TILE, rows, n, matrix, Dv, out)
        t += n


@inlined
def _place(matrix, c):
    """Of the vector of columns from c on: bytes from its row's address and scale, and its shift."""
    at = matrix.first + c
    shift = matrix.shift + at // matrix.wrap * matrix.bits
    return at % matrix.wrap * matrix.column, c // matrix.group * 4, shift


@inlined
def _vector(matrix, i, at, scale, shift):
    """The floats of row i at a place."""
    row = matrix.address + i * matrix.row + at
    if matrix.bits == 0:
        return load(row, 0)
    scale += i * matrix.next_scale
    codes = load_codes(row, 0, shift, (1 << matrix.bits) - 1)
    return multiply_add(
        codes, spread(float_at(matrix.scales + scale, 0)), spread(float_at(matrix.zeros + scale, 0))
    )


@inlined
def add_products(x, x_step, rows, n, matrix, columns, out):
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
def turn(x, x_step, rows, n, matrix, columns, out):
    """out[rows, columns] = x[rows, :n] @ floats [n, columns]; once per call, so in few words."""
    for r in range(rows):
        for c in range(0, columns, LANES):
            a = spread(ZERO)
            for i in range(n):
                b = spread(float_at(x, r * x_step + i))
                a = multiply_add(b, load(matrix, i * columns + c), a)
            store(out, r * columns + c, a)


@inlined
def _add_two(x, x_step, n, matrix, c, columns, out):
    """Two rows by the four vectors from column c on, sums in eight registers."""
    at0, scale0, shift0 = _place(matrix, c)
    at1, scale1, shift1 = _place(matrix, c + LANES)
    at2, scale2, shift2 = _place(matrix, c + 2 * LANES)
    at3, scale3, shift3 = _place(matrix, c + 3 * LANES)
    y, out1 = x + 4 * x_step, out + 4 * columns
    a0, a1 = load(out, 0), load(out, LANES)
    a2, a3 = load(out, 2 * LANES), load(out, 3 * LANES)
    b0, b1 = load(out1, 0), load(out1, LANES)
    b2, b3 = load(out1, 2 * LANES), load(out1, 3 * LANES)
    for i in range(n):
        if matrix.ahead:
            prefetch(matrix.address + at0 + i * matrix.row + matrix.ahead)
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
    y, z = x + 4 * x_step, x + 8 * x_step
    out1, out2 = out + 4 * columns, out + 8 * columns
    a0, a1 = load(out, 0), load(out, LANES)
    a2, a3 = load(out, 2 * LANES), load(out, 3 * LANES)
    b0, b1 = load(out1, 0), load(out1, LANES)
    b2, b3 = load(out1, 2 * LANES), load(out1, 3 * LANES)
    d0, d1 = load(out2, 0), load(out2, LANES)
    d2, d3 = load(out2, 2 * LANES), load(out2, 3 * LANES)
    for i in range(n):
        if matrix.ahead:
            prefetch(matrix.address + at0 + i * matrix.row + matrix.ahead)
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
