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
    places, y, out1 = _places(matrix, c), x + 4 * x_step, out + 4 * columns
    a, b = _four(out), _four(out1)
    for i in range(n):
        m = _vectors(matrix, i, places)
        a, b = _added(float_at(x, i), m, a), _added(float_at(y, i), m, b)
    _store_four(out, a)
    _store_four(out1, b)


@inlined
def _add_three(x, x_step, n, matrix, c, columns, out):
    """Three rows by the four vectors from column c on, sums in twelve registers."""
    places, y, z = _places(matrix, c), x + 4 * x_step, x + 8 * x_step
    out1, out2 = out + 4 * columns, out + 8 * columns
    a, b, d = _four(out), _four(out1), _four(out2)
    for i in range(n):
        m = _vectors(matrix, i, places)
        a, b = _added(float_at(x, i), m, a), _added(float_at(y, i), m, b)
        d = _added(float_at(z, i), m, d)
    _store_four(out, a)
    _store_four(out1, b)
    _store_four(out2, d)


@inlined
def _places(matrix, c):
    """Of the four vectors of columns from c on."""
    return (
        _place(matrix, c),
        _place(matrix, c + LANES),
        _place(matrix, c + 2 * LANES),
        _place(matrix, c + 3 * LANES),
    )


@inlined
def _vectors(matrix, i, places):
    """The floats of row i at four places; asks for those of a later row."""
    if matrix.ahead:
        prefetch(matrix.address + places[0][0] + i * matrix.row + matrix.ahead)
    return (
        _vector(matrix, i, *places[0]),
        _vector(matrix, i, *places[1]),
        _vector(matrix, i, *places[2]),
        _vector(matrix, i, *places[3]),
    )


@inlined
def _added(x, m, sums):
    """`sums + x * m`, of four vectors."""
    a = spread(x)
    return (
        multiply_add(a, m[0], sums[0]),
        multiply_add(a, m[1], sums[1]),
        multiply_add(a, m[2], sums[2]),
        multiply_add(a, m[3], sums[3]),
    )


@inlined
def _four(address):
    """Four vectors, one after the other."""
    return (
        load(address, 0),
        load(address, LANES),
        load(address, 2 * LANES),
        load(address, 3 * LANES),
    )


@inlined
def _store_four(address, vectors):
    """Write them there."""
    store(address, 0, vectors[0])
    store(address, LANES, vectors[1])
    store(address, 2 * LANES, vectors[2])
    store(address, 3 * LANES, vectors[3])
