"""The kernels: attention over a share of the columns, and the merge of the shares.

Z is `sizes.Sizes`.
"""

import triton
import triton.language as tl

from .decode import dot, dot_codes, load_keys, load_values, of, place_of, unpack


@triton.jit(do_not_specialize=["F", "N", "R", "skip", "H", "G", "S", "share"])
def attend(
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
        keys = of(tokens[0], at, token.to(tl.int64))[None, :] + k[:, None]
        keys = tl.load(keys, mask=k_real[:, None] & inside[None, :], other=0.0)
        scores = dot(q, keys.to(q.dtype), tl.full((Z.ROWS, Z.TILE), 0.0, tl.float32)) * scale
        scores = _visible(scores, rows, column + token, inside, Z)
        values = of(tokens[1], at, token.to(tl.int64))[:, None, None] + v[None, :, :]
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
    keys = load_keys(blocks, at, tl.minimum(first, last), channels, Z)
    values = load_values(blocks, at, tl.minimum(first, last), channels, Z)
    for i in tl.range(first, end, num_stages=1):
        codes, k_scale, k_zero = keys
        keys = load_keys(blocks, at, tl.minimum(i + 1, last), channels, Z)
        # q . (code * scale + zero) = (q * scale) . code + q . zero: no factor depends on t
        x = q.to(tl.float32) * scale
        constant = tl.sum(x * k_zero.to(tl.float32)[None, :], 1)
        x *= k_scale.to(tl.float32)[None, :]
        codes = unpack(codes, tl.arange(0, 8 // Z.K_BITS)[None, :, None], Z.K_BITS)
        codes = tl.reshape(codes, (Z.K, Z.RUNS * Z.PAD))
        scores = dot_codes(x, codes, q.dtype) + constant[:, None]
        block, token, held = place_of(i, Z.RUNS, Z)
        token += block.to(tl.int32) * Z.BLOCK - skip
        scores = _visible(scores, rows, column + token, held & (token >= 0), Z)

        codes, v_scale, v_zero = values
        values = load_values(blocks, at, tl.minimum(i + 1, last), channels, Z)
        codes = unpack(codes, tl.arange(0, 8 // Z.V_BITS)[:, None, None, None], Z.V_BITS)
        codes = codes * v_scale.to(tl.float32)[:, :, :, None] + v_zero.to(tl.float32)[:, :, :, None]
        codes = tl.reshape(codes.to(q.dtype), (Z.RUNS * Z.PAD, Z.GROUPS * Z.WIDTH))
        highest, total, sums = _fold(highest, total, sums, scores, codes)
    return highest, total, sums


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
    sums = dot(weights.to(values.dtype), values, sums * keep[:, None])
    return new, total * keep + tl.sum(weights, 1), sums


@triton.jit(do_not_specialize=["splits"])
def merge(
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
