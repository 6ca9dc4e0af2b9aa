"""Compiled: codes of keys and values, as `codecs/integers.py` specifies them, byte for byte.

Each number goes through the operations of float32 that torch would do, in the same order; where
several are added up, torch has done so. Nothing is contracted or taken in another order.
"""

import numpy as np
from numba import float32, float64, int64, intp, njit, prange, types, uint8, uint16

from ...codecs.integers import HALF_A_LEVEL
from ...codecs.quantize import F16_MAX
from .simd import from_half, to_half
from .tiles import ONE, ZERO

TINY = np.float32(1e-30)
F16_MAX = np.float32(F16_MAX)
HALF_A_LEVEL = np.float32(HALF_A_LEVEL)
# not `inlined`: LLVM finds the vectors of a loop more easily in a function of its own
compiled = njit(error_model="numpy")


def _array(kind, axes):
    return types.Array(kind, axes, "C")


KEYS = (
    *(intp, _array(float32, 4), intp, intp, _array(int64, 2), _array(float32, 3)),
    *(_array(uint8, 4), _array(uint16, 3), _array(uint16, 3)),
)
VALUES = (
    *(intp, _array(float32, 4), intp, _array(float32, 4), intp, float64, _array(float32, 1)),
    *(_array(uint8, 4), _array(uint8, 4)),
)


def encode_keys(workers, x, start, bits, order, weights, codes, scale, zero):
    """Encode blocks x [R, n, G, D] of R rows as the blocks `start` and on of N.

    Writes codes [R, N, D, G * bits / 8], and as the integers of the same bits float16 scale and
    zero [R, N, D]. order [R, D] and weights [R, D, D]: `order_and_weights`; of no rows: codes are
    the nearest ones.
    """
    blocks = x.shape[0] * x.shape[1]
    for worker in prange(workers):
        first, end = blocks * worker // workers, blocks * (worker + 1) // workers
        some_keys(first, end, x, start, bits, order, weights, codes, scale, zero)


def encode_values(workers, x, start, mean_square, bits, most, steps, codes, scale):
    """Encode blocks x [R, n, G, D] of R rows as the blocks `start` and on of N.

    Writes codes [R, N, G * bits / 8, D] and scale [R, N, G, D / g]. mean_square [R, n, G, D / g]:
    of the groups of a token; most: `LARGEST` of the bits, 0 where there is none, and no mean square
    is read; steps [256]: `levels` of the bits.
    """
    blocks = x.shape[0] * x.shape[1]
    for worker in prange(workers):
        first, end = blocks * worker // workers, blocks * (worker + 1) // workers
        some_values(first, end, x, start, mean_square, bits, most, steps, codes, scale)


@compiled
def some_keys(first, end, x, start, bits, order, weights, codes, scale, zero):
    """`encode_keys` of blocks first:end of all rows."""
    _, n, G, D = x.shape
    fed, top = len(order) > 0, np.float32((1 << bits) - 1)
    step, low, high = np.empty(D, np.float32), np.empty(D, np.float32), np.empty(D, np.float32)
    own, packed = np.empty((G, D), np.uint8), np.empty((G * bits // 8, D), np.uint8)
    errors = np.empty((D if fed else 0, G), np.float32)
    for block in range(first, end):
        r, i = block // n, start + block % n
        numbers = x[r, block % n]
        ranges(numbers, low, high)
        for d in range(D):
            z = half_below(F16_MAX if low[d] > F16_MAX else low[d])
            low[d] = from_half(z)
            s = half_below(-(high[d] - low[d]) / top) ^ 0x8000
            step[d] = from_half(s)
            scale[r, i, d], zero[r, i, d] = np.uint16(s), np.uint16(z)
        if fed:
            round_for_queries(numbers, step, low, top, order[r], weights[r], errors, own)
        else:
            round_to_nearest(numbers, step, low, top, own)
        pack(own, bits, packed)
        for d in range(D):
            for byte in range(len(packed)):
                codes[r, i, d, byte] = packed[byte, d]


@compiled
def ranges(x, low, high):
    """The least and the largest number of each channel of x [G, D]; NaN, where there is one."""
    G, D = x.shape
    for d in range(D):
        low[d] = high[d] = x[0, d]
    for t in range(1, G):
        for d in range(D):
            number = x[t, d]
            low[d] = number if (number < low[d]) | (number != number) else low[d]
            high[d] = number if (number > high[d]) | (number != number) else high[d]


@compiled
def half_below(x):
    """Bits of a float16 that is not above x, as `quantize` finds it."""
    y = from_half(to_half(x))
    step = max(abs(y) * np.float32(2.0**-10), np.float32(2.0**-24))
    return to_half(y - step if y > x else y)


@compiled
def round_to_nearest(x, step, low, top, codes):
    """Codes [G, D] of x [G, D]."""
    G, D = x.shape
    for d in range(D):
        step[d] = TINY if step[d] < TINY else step[d]
    for t in range(G):
        for d in range(D):
            codes[t, d] = code_of(np.rint((x[t, d] - low[d]) / step[d]), top)


@compiled
def code_of(number, top):
    """A whole number as a code from 0 to top; 0 where it is NaN."""
    number = number if number > ZERO else ZERO
    return np.uint8(top if number > top else number)


@compiled
def round_for_queries(x, step, low, top, order, weights, errors, codes):
    """Codes [G, D] of x [G, D], as `feedback.round_keys` finds them; errors [D, G]: scratch."""
    G, D = x.shape
    lost, own, found = np.empty(G, np.float32), np.empty(G, np.float32), np.empty(G, np.uint8)
    for j in range(D):
        channel = order[j]
        for t in range(G):
            own[t] = x[t, channel]
        add_up(errors, weights[j], j, lost)
        round_channel(own, lost, step[channel], low[channel], top, found, errors[j])
        for t in range(G):
            codes[t, channel] = found[t]


@compiled
def add_up(errors, weight, n, lost):
    """What the first n channels have lost, of errors [D, G], by weight [D]: lost [G]."""
    G = len(lost)
    for t in range(G):
        lost[t] = ZERO
    for i in range(0, n - n % 4, 4):  # one pass over `lost` for four channels
        a, b, c, d = weight[i], weight[i + 1], weight[i + 2], weight[i + 3]
        for t in range(G):
            some = (lost[t] + a * errors[i, t]) + b * errors[i + 1, t]
            lost[t] = (some + c * errors[i + 2, t]) + d * errors[i + 3, t]
    for i in range(n - n % 4, n):
        for t in range(G):
            lost[t] += weight[i] * errors[i, t]


@compiled
def round_channel(own, lost, step, low, top, codes, errors):
    """Codes and errors [G] of a channel's numbers, which make up for what is lost."""
    inverse = ONE / (TINY if step < TINY else step)
    for t in range(len(own)):
        number = (own[t] - low) * inverse
        code = np.rint(number - lost[t] * inverse)
        down, up = np.floor(number), np.ceil(number)
        code = down if code < down else code
        code = code_of(up if code > up else code, top)
        codes[t] = code
        errors[t] = np.float32(code) * step + low - own[t]


@compiled
def some_values(first, end, x, start, mean_square, bits, most, steps, codes, scale):
    """`encode_values` of blocks first:end of all rows."""
    _, n, G, D = x.shape
    groups = scale.shape[3]
    most, exact_half = np.float32(most), ((1 << bits) - 1) / 2
    half, top = np.float32(exact_half), np.float32(2 * exact_half)
    least = np.float32(exact_half / (exact_half + 1))
    own, packed = np.empty((G, D), np.uint8), np.empty((G * bits // 8, D), np.uint8)
    in_groups, largest = own.reshape(G, groups, D // groups), np.empty((G, groups), np.uint32)
    sizes = largest.view(np.float32)
    for block in range(first, end):
        r, i = block // n, start + block % n
        numbers = x[r, block % n].reshape(in_groups.shape)
        largest_of(numbers.view(np.uint32), largest)
        for t in range(G):
            for k in range(groups):
                wanted = sizes[t, k]
                if most > ZERO:
                    size = wanted
                    wanted = most * np.sqrt(mean_square[r, block % n, t, k])
                    wanted = size if size < wanted else wanted
                    wanted, size = wanted * HALF_A_LEVEL, size * least
                    wanted = size if size > wanted else wanted
                byte = level(wanted / half, steps)
                scale[r, i, t, k] = np.uint8(byte)
                step = steps[byte]
                inverse = ONE / (TINY if step < TINY else step)
                round_group(numbers[t, k], inverse, half, top, in_groups[t, k])
        pack(own, bits, packed)
        for row in range(len(packed)):
            for d in range(D):
                codes[r, i, row, d] = packed[row, d]


@compiled
def largest_of(x, largest):
    """The largest number of each group [G, n] of x [G, n, g], all of them as bits: but for the
    sign these are ordered as the numbers are, and NaN is above all of them.
    """
    G, n, g = x.shape
    for t in range(G):
        for i in range(n):
            most = np.uint32(0)
            for d in range(g):
                bits = x[t, i, d] & np.uint32(0x7FFFFFFF)
                if bits > most:
                    most = bits
            largest[t, i] = most


@compiled
def level(step, steps):
    """The first of 256 steps that is not below `step`; the last one where that is NaN."""
    found, more = 0, 128
    while more:
        if not step <= steps[found + more - 1]:
            found += more
        more >>= 1
    return found


@compiled
def round_group(x, inverse, half, top, codes):
    """Codes [g] of numbers [g], the nearest ones."""
    for d in range(len(x)):
        codes[d] = code_of(np.rint(x[d] * inverse + half), top)


@compiled
def pack(codes, bits, out):
    """Codes [G, D] packed along tokens, as `formats.py` says: out [G * bits / 8, D]."""
    low = 2 if bits == 3 else 4 if 4 < bits < 8 else bits
    rows = len(codes) * low // 8
    plane(codes, 0, low, out[:rows])
    if low < bits:
        plane(codes, low, bits - low, out[rows:])


@compiled
def plane(codes, shift, width, out):
    """Bits shift:shift + width of codes [G, D] packed along tokens: out [G * width / 8, D]."""
    rows, D = out.shape
    keep = (1 << width) - 1
    for i in range(rows):
        for k in range(8 // width):
            token = 8 * i + k if width == 1 else i + k * rows
            for d in range(D):
                part = np.uint8(((codes[token, d] >> shift) & keep) << (k * width))
                out[i, d] = part if k == 0 else out[i, d] | part
