"""Encoded blocks in registers: bytes are loaded, unpacked and multiplied."""

import triton
import triton.language as tl

from ...codecs import formats

LEVELS, LEVEL_0 = tl.constexpr(formats.LEVELS), tl.constexpr(formats.LEVEL_0)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1


@triton.jit
def load_keys(blocks, at, i, channels, Z: tl.constexpr):
    """Key bytes [K, 1, n] of step i, scale and zero [K]."""
    k, real, _, _ = channels
    block, byte, held = place_of(i, Z.RUNS * Z.K_BITS // 8, Z)
    codes = of(blocks[0], at, block) + k[:, None, None] * (Z.BLOCK * Z.K_BITS // 8)
    inside = real[:, None, None] & held[None, None, :]
    codes = tl.load(codes + byte[None, None, :], mask=inside, other=0)
    scale = tl.load(of(blocks[1], at, block) + k, mask=real, other=0.0)
    zero = tl.load(of(blocks[2], at, block) + k, mask=real, other=0.0)
    return codes, scale, zero


@triton.jit
def load_values(blocks, at, i, channels, Z: tl.constexpr):
    """Value bytes [1, n, GROUPS, WIDTH] of step i, scale and zero [8 / V_BITS, n, GROUPS]."""
    _, _, v, real = channels
    block, byte, held = place_of(i, Z.RUNS * Z.V_BITS // 8, Z)
    codes = of(blocks[3], at, block) + byte[None, :, None, None] * Z.DV + v[None, None, :, :]
    inside = held[None, :, None, None] & real[None, None, :, :]
    codes = tl.load(codes, mask=inside, other=0)
    token = tl.arange(0, 8 // Z.V_BITS)[:, None] * (Z.BLOCK * Z.V_BITS // 8) + byte[None, :]
    group = tl.arange(0, Z.GROUPS)[None, None, :]
    place = token[:, :, None] * (Z.DV // Z.GROUP) + group
    inside = held[None, :, None] & (group < Z.DV // Z.GROUP)
    scale = tl.load(of(blocks[4], at, block) + place, mask=inside, other=0.0)
    zero = tl.load(of(blocks[5], at, block) + place, mask=inside, other=0.0)
    return codes, scale, zero


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
