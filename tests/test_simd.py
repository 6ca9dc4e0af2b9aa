"""Vector operations: compiled, they do what their Python bodies say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from kvplug.kernels.numba import simd
from kvplug.kernels.numba.simd import LANES
from kvplug.testing.tools import DRAWN

FLOATS = st.floats(-1e4, 1e4, width=32)
VECTORS = st.lists(FLOATS, min_size=LANES, max_size=LANES).map(lambda x: np.array(x, np.float32))


@njit
def compiled_add(x, y, z, out):
    simd.store(out, 0, simd.multiply_add(simd.load(x, 0), simd.load(y, 0), simd.load(z, 0)))


@njit
def compiled_exp2(x, out):
    simd.store(out, 0, simd.exp2(simd.load(x, 0)))


@njit
def compiled_larger(x, y, out):
    simd.store(out, 0, simd.larger(simd.load(x, 0), simd.load(y, 0)))


@njit
def compiled_choice(x, y, z, out):
    simd.store(out, 0, simd.where_positive(simd.load(x, 0), simd.load(y, 0), simd.load(z, 0)))


@njit
def compiled_sums(x):
    return simd.largest(simd.load(x, 0)), simd.total(simd.load(x, 0))


@njit
def compiled_codes(x, i, shift, keep, out):
    simd.store(out, 0, simd.load_codes(x, i, shift, keep))


@njit
def compiled_scalars(x, i, out):
    simd.put(out, 0, simd.float_at(x, i))
    simd.put(out, 1, simd.half_at(x, i))
    simd.put(out, 2, simd.bfloat_at(x, i))
    return simd.byte_at(x, i)


@njit
def compiled_halves(bits, x):
    return simd.from_half(bits), simd.to_half(x)


@njit
def compiled_bits(x, i, out):
    simd.store(out, 0, simd.load_bits(x, i))


def answer(function, *args):
    """What `function` writes to its last argument."""
    out = np.zeros(LANES, np.float32)
    function(*[x.ctypes.data if isinstance(x, np.ndarray) else x for x in args], out.ctypes.data)
    return out


@settings(DRAWN)
@given(x=VECTORS, y=VECTORS, z=VECTORS)
def test_arithmetic(x, y, z):
    for function, args in (
        (compiled_add, (x, y, z)),
        (compiled_larger, (x, y)),
        (compiled_choice, (x, y, z)),
    ):
        expected = answer(function.py_func, *args)
        np.testing.assert_allclose(answer(function, *args), expected, rtol=1e-6, atol=16)
    assert np.array_equal(answer(compiled_larger, x, y), np.maximum(x, y))
    assert np.array_equal(answer(compiled_choice, x, y, z), np.where(x > 0, y, z))
    largest, total = compiled_sums(x.ctypes.data)
    assert largest == x.max()
    np.testing.assert_allclose(total, x.sum(dtype=np.float64), atol=0.1)


@settings(DRAWN)
@given(x=st.lists(st.floats(-200, 0, width=32), min_size=LANES, max_size=LANES))
def test_exp2(x):
    """Relative error of a few float32 roundings; what is too small is zero."""
    x = np.array(x, np.float32)
    expected = np.where(x < -126, 0, 2.0 ** x.astype(np.float64))
    for function in (compiled_exp2, compiled_exp2.py_func):
        np.testing.assert_allclose(answer(function, x), expected, rtol=5e-7)


def test_exp2_of_what_is_no_number():
    x = np.full(LANES, -np.inf, np.float32)
    x[0], x[1] = np.nan, 0
    for function in (compiled_exp2, compiled_exp2.py_func):
        out = answer(function, x)
        assert np.isnan(out[0])
        assert out[1] == 1
        assert not out[2:].any()


@pytest.mark.parametrize(("shift", "keep"), [(0, 255), (0, 15), (4, 15), (2, 3), (6, 3)])
def test_codes(shift, keep):
    x = np.arange(256, dtype=np.uint8)
    for i in (0, 3, 256 - LANES):
        expected = ((x[i : i + LANES] >> shift) & keep).astype(np.float32)
        for function in (compiled_codes, compiled_codes.py_func):
            assert np.array_equal(answer(function, x, i, shift, keep), expected)


def test_scalars():
    """Every format that memory may hold, subnormal numbers and infinities too."""
    bits = np.arange(0, 65536, 7, dtype=np.uint16)
    halves, brains = bits.view(np.float16), (bits.astype(np.uint32) << 16).view(np.float32)
    x, out = np.concatenate((bits, bits)), np.zeros(LANES, np.float32)
    for i in range(0, len(bits) // 2, 13):
        for function in (compiled_scalars, compiled_scalars.py_func):
            byte = function(x.ctypes.data, i, out.ctypes.data)
            expected = [x.view(np.float32)[i], halves[i], brains[i]]
            assert np.array_equal(out[:3], np.array(expected, np.float32), equal_nan=True)
            assert byte == x.view(np.uint8)[i]


def test_to_and_from_half():
    """Rounded to nearest, ties to even, from below the least to above the largest float16."""
    x = np.array([0.0, -0.0, 1, 1 + 2**-11, 1 + 3 * 2**-11, -2.1, 2**-25, 2**-24, 3e-6], np.float32)
    x = np.concatenate((x, np.array([65504, 65519.9, 65520, 1e9, -np.inf], np.float32)))
    with np.errstate(over="ignore"):
        wanted = x.astype(np.float16)
    for function in (compiled_halves, compiled_halves.py_func):
        for half, number in zip(wanted, x, strict=True):
            bits = int(half.view(np.uint16))
            assert function(bits, number) == (float(half), bits)
        back, bits = function(0x7E00, np.float32(np.nan))
        assert np.isnan(back)
        assert np.isnan(np.uint16(bits).view(np.float16))


def test_bits():
    x = np.arange(256, dtype=np.uint8)
    expected = np.unpackbits(x, bitorder="little").astype(np.float32)
    for i in range(0, len(expected), LANES):
        for function in (compiled_bits, compiled_bits.py_func):
            assert np.array_equal(answer(function, x, i), expected[i : i + LANES])
