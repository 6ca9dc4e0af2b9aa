"""Encoded blocks in registers: bytes are loaded, unpacked and multiplied."""

import triton
import triton.language as tl

from ...codecs import formats

LEVELS, LEVEL_0 = tl.constexpr(formats.LEVELS), tl.constexpr(formats.LEVEL_0)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1


@triton.jit
def load_keys(blocks, at, i, channels, Z: tl.constexpr):
    """Key bytes of step i [K, 1, n], of the first plane and of the second; scale and zero [K]."""
    k, real, _, _ = channels
    low = load_key_plane(blocks, at, i, k, real, 0, Z.K_LOW, Z)
    high = tl.zeros((1,), tl.uint8)  # where there is none
    if Z.K_BITS > Z.K_LOW:
        first: tl.constexpr = Z.BLOCK * Z.K_LOW // 8
        high = load_key_plane(blocks, at, i, k, real, first, Z.K_BITS - Z.K_LOW, Z)
    block, _, _ = place_of(i, Z.RUNS, Z)
    scale = tl.load(of(blocks[1], at, block) + k, mask=real, other=0.0)
    zero = tl.load(of(blocks[2], at, block) + k, mask=real, other=0.0)
    return low, high, scale, zero


@triton.jit
def load_key_plane(
    blocks, at, i, k, real, FIRST: tl.constexpr, BITS: tl.constexpr, Z: tl.constexpr
):
    """Bytes [K, 1, n] of a plane that begins FIRST bytes into a channel; of 1 bit, its codes."""
    block, byte, held, shift = byte_of(i, BITS, Z)
    codes = of(blocks[0], at, block) + k[:, None, None] * (Z.BLOCK * Z.K_BITS // 8) + FIRST
    inside = real[:, None, None] & held[None, None, :]
    codes = tl.load(codes + byte[None, None, :], mask=inside, other=0)
    return (codes >> shift[None, None, :]) & 1 if BITS == 1 else codes


@triton.jit
def load_values(blocks, at, i, channels, Z: tl.constexpr):
    """Value bytes of step i [1, n, GROUPS, WIDTH], of the first plane and of the second; scale and
    zero [8 / V_LOW, n, GROUPS].
    """
    _, _, v, real = channels
    low = load_value_plane(blocks, at, i, v, real, 0, Z.V_LOW, Z)
    high = tl.zeros((1,), tl.uint8)  # where there is none
    if Z.V_BITS > Z.V_LOW:
        first: tl.constexpr = Z.BLOCK * Z.V_LOW // 8
        high = load_value_plane(blocks, at, i, v, real, first, Z.V_BITS - Z.V_LOW, Z)
    block, byte, held = place_of(i, Z.RUNS * Z.V_LOW // 8, Z)
    token = tl.arange(0, 8 // Z.V_LOW)[:, None] * (Z.BLOCK * Z.V_LOW // 8) + byte[None, :]
    group = tl.arange(0, Z.GROUPS)[None, None, :]
    place = token[:, :, None] * (Z.DV // Z.GROUP) + group
    inside = held[None, :, None] & (group < Z.DV // Z.GROUP)
    scale = tl.load(of(blocks[4], at, block) + place, mask=inside, other=0.0)
    zero = tl.load(of(blocks[5], at, block) + place, mask=inside, other=0.0)
    return low, high, scale, zero


@triton.jit
def load_value_plane(
    blocks, at, i, v, real, FIRST: tl.constexpr, BITS: tl.constexpr, Z: tl.constexpr
):
    """Bytes [1, n, GROUPS, WIDTH] of a plane that begins at row FIRST; of 1 bit, its codes."""
    block, byte, held, shift = byte_of(i, BITS, Z)
    place = (FIRST + byte[None, :, None, None]) * Z.DV + v[None, None, :, :]
    inside = held[None, :, None, None] & real[None, None, :, :]
    codes = tl.load(of(blocks[3], at, block) + place, mask=inside, other=0)
    return (codes >> shift[None, :, None, None]) & 1 if BITS == 1 else codes


@triton.jit
def byte_of(i, BITS: tl.constexpr, Z: tl.constexpr):
    """The block of step i, the bytes of a plane that it needs, which of them are real, and the bit.

    A byte of a plane of 1 bit has 8 consecutive tokens, and is there for each of them.
    """
    if BITS == 1:
        block, token, held = place_of(i, Z.RUNS, Z)
        byte, shift = token // 8, (token % 8).to(tl.uint8)
    else:
        block, byte, held = place_of(i, Z.RUNS * BITS // 8, Z)
        shift = tl.zeros_like(byte).to(tl.uint8)
    return block, byte, held, shift


@triton.jit
def scale_of(scale, zero, Z: tl.constexpr):
    """Scale and zero of values as numbers; those of `rotated` from a byte."""
    if Z.TURNED:
        step = tl.exp2((scale.to(tl.float32) - LEVEL_0) / LEVELS) * (2 / ((1 << Z.V_BITS) - 1))
        step = tl.where(scale == 0, 0.0, tl.where(scale == 255, float("inf"), step))
        return step, step * (-((1 << Z.V_BITS) - 1) / 2)
    return scale.to(tl.float32), zero.to(tl.float32)


@triton.jit
def place_of(i, RUNS: tl.constexpr, Z: tl.constexpr):
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
def unpack(packed, shift, BITS: tl.constexpr):
    """All codes that bytes hold, as float32: an axis of size 1 grows to that of `shift`."""
    return ((packed >> (shift * BITS).to(tl.uint8)) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def key_codes(low, high, Z: tl.constexpr):
    """Codes [K, t] float32 of key bytes."""
    codes = unpack(low, tl.arange(0, 8 // Z.K_LOW)[None, :, None], Z.K_LOW)
    codes = tl.reshape(codes, (Z.K, Z.RUNS * Z.PAD))
    HIGH: tl.constexpr = Z.K_BITS - Z.K_LOW
    if HIGH == 1:
        codes += tl.reshape(high, (Z.K, Z.RUNS * Z.PAD)).to(tl.float32) * (1 << Z.K_LOW)
    elif HIGH > 1:
        more = unpack(high, tl.arange(0, 8 // HIGH)[None, :, None], HIGH)
        codes += tl.reshape(more, (Z.K, Z.RUNS * Z.PAD)) * (1 << Z.K_LOW)
    return codes


@triton.jit
def value_codes(low, high, Z: tl.constexpr):
    """Codes [8 / V_LOW, n, GROUPS, WIDTH] float32 of value bytes."""
    codes = unpack(low, tl.arange(0, 8 // Z.V_LOW)[:, None, None, None], Z.V_LOW)
    HIGH: tl.constexpr = Z.V_BITS - Z.V_LOW
    if HIGH == 1:
        codes += tl.reshape(high, codes.shape).to(tl.float32) * (1 << Z.V_LOW)
    elif HIGH > 1:
        more = unpack(high, tl.arange(0, 8 // HIGH)[:, None, None, None], HIGH)
        codes += tl.reshape(more, codes.shape) * (1 << Z.V_LOW)
    return codes


@triton.jit
def dot_codes(x, codes, LIKE: tl.constexpr):
    """X [M, K] float32 @ codes [K, t] of at most 8 bits.

    Tensor cores multiply bfloat16: a code is one exactly, x the sum of two within 2**-17. (NaN may
    get lost here; it is in q . zero too.)
    """
    scores = tl.full((x.shape[0], codes.shape[1]), 0.0, tl.float32)
    if LIKE.is_fp32():
        scores = dot(x, codes, scores)
    else:
        for _ in tl.static_range(2):
            part = (x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000  # rounded to 8 bits
            part = part.to(tl.float32, bitcast=True)
            scores = dot(part.to(tl.bfloat16), codes.to(tl.bfloat16), scores)
            x -= part
    return scores


@triton.jit
def dot(a, b, acc):
    """Acc + a [M, k] @ b [k, n], in float32."""
    if INTERPRETED:  # numpy has no bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def of(x, at, i):
    """Where tokens or blocks i of row and head `at` start."""
    return x[0] + at[0] * x[1] + at[1] * x[2] + i * x[3]
