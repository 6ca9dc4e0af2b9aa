"""The kernels: attention over a share of the columns, and the merge of the shares.

Z is `sizes.Sizes`.
"""

import triton
import triton.language as tl

from .decode import (
    dot,
    dot_codes,
    key_codes,
    load_keys,
    load_values,
    of,
    place_of,
    scale_of,
    value_codes,
)

CHUNK = tl.constexpr(16)  # channels that the merge turns back at once


@triton.jit(do_not_specialize=["F", "N", "R", "skip", "H", "G", "S", "share"])
def attend(
    query, turned, mask, head, middle, tail, out, lse, totals,
    F, N, R, skip, H, G, S, share, scale, Z: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of rows over one share of the columns.

    The columns are F pinned tokens, N blocks less `skip` hidden tokens (without K_BITS: N tokens),
    and R tokens of the tail. A step is TILE tokens as they came or STEP tokens of a block, a share
    so many steps. Writes out [parts, B * H * G * S, DV] and lse [parts, B * H * G * S]. A share is
    a part; where blocks are turned, what shares found in these comes first, then the rest.
    With `totals`, shaped like `lse`, that gets the running maximum and these the sum of weights.
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
    part = tl.program_id(2)
    if middle is not None:
        span = first, share, N
        if Z.K_BITS == 0:
            state = _read_tokens(state, rows, middle, at, span, F, channels, Z)
        elif Z.TURNED:
            wide = turned[0] + b * turned[1] + g * turned[2] + s * turned[3]
            wide = tl.load(wide[:, None] + k[None, :], mask=(k < Z.DK)[None, :], other=0.0)
            found = _read_blocks(state, rows, wide, middle, at, span, F, skip, channels, Z)
            _write(found, part, row, G * S, out, lse, totals, v, channels, Z)
            part += tl.num_programs(2)
        else:
            wide = q.to(tl.float32)
            state = _read_blocks(state, rows, wide, middle, at, span, F, skip, channels, Z)
        first -= tl.cdiv(N * Z.BLOCK, Z.STEP)
    if head is not None:
        state = _read_tokens(state, rows, head, at, (first, share, F), 0, channels, Z)
        first -= tl.cdiv(F, Z.TILE)
    column = F + N * Z.BLOCK - skip
    state = _read_tokens(state, rows, tail, at, (first, share, R), column, channels, Z)
    _write(state, part, row, G * S, out, lse, totals, v, channels, Z)


@triton.jit
def _write(state, part, row, rows, out, lse, totals, v, channels, Z: tl.constexpr):
    """What one program has found is the part `part` of the result of its rows."""
    highest, total, sums = state
    weight = total
    total = tl.where(total == 0, 1.0, total)  # a row that sees nothing: zeros and -inf
    part = part * tl.num_programs(1) + tl.program_id(1)
    place = part.to(tl.int64) * rows + row
    inside = row < rows
    if totals is None:
        tl.store(lse + place, highest + tl.log(total), mask=inside)
    else:
        tl.store(lse + place, highest, mask=inside)
        tl.store(totals + place, weight, mask=inside)
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
def _read_blocks(state, rows, wide, blocks, at, span, column, skip, channels, Z: tl.constexpr):
    """Steps first:first + share over n blocks, of which token `skip` is in `column`.

    wide: the query [M, K] in float32, turned as the keys are.
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
        low, high, k_scale, k_zero = keys
        keys = load_keys(blocks, at, tl.minimum(i + 1, last), channels, Z)
        # q . (code * scale + zero) = (q * scale) . code + q . zero: no factor depends on t
        x = wide * scale
        # codes around zero, which are exact in bfloat16 too, lose less in `dot_codes`
        half: tl.constexpr = 1 << (Z.K_BITS - 1)
        k_scale = k_scale.to(tl.float32)
        constant = tl.sum(x * (k_zero.to(tl.float32) + half * k_scale)[None, :], 1)
        x *= k_scale[None, :]
        scores = dot_codes(x, key_codes(low, high, Z) - half, q.dtype) + constant[:, None]
        block, token, held = place_of(i, Z.RUNS, Z)
        token += block.to(tl.int32) * Z.BLOCK - skip
        scores = _visible(scores, rows, column + token, held & (token >= 0), Z)

        low, high, v_scale, v_zero = values
        values = load_values(blocks, at, tl.minimum(i + 1, last), channels, Z)
        v_scale, v_zero = scale_of(v_scale, v_zero, Z)
        codes = value_codes(low, high, Z) * v_scale[:, :, :, None] + v_zero[:, :, :, None]
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


@triton.jit(do_not_specialize=["parts"])
def merge(
    found, highests, totals, out, lse, matrix, parts,
    DV: tl.constexpr, V: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One row of what parts found [parts, rows, DV] -> out [rows, DV] and lse [rows].

    highests, totals [parts, rows]: the largest score, and the sum of weights relative to that. With
    a matrix [DV, DV] the first half of the parts is turned back: it is multiplied by that.
    """
    row = tl.program_id(0).to(tl.int64)
    split, v = tl.arange(0, SPLITS), tl.arange(0, V)
    place = split.to(tl.int64) * tl.num_programs(0) + row
    each = tl.load(highests + place, mask=split < parts, other=-float("inf"))
    highest = tl.max(each, 0)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    weights = tl.exp(each - base) * tl.load(totals + place, mask=split < parts, other=0.0)
    total = tl.sum(weights, 0)
    total = tl.where(total == 0, 1.0, total)
    plain = split < parts
    if matrix is not None:
        plain = (split >= parts // 2) & plain
    inside = plain[:, None] & (v < DV)[None, :]
    sums = tl.load(found + place[:, None] * DV + v[None, :], mask=inside, other=0.0)
    sums = tl.sum(sums * weights[:, None], 0)
    if matrix is not None:
        for first in range(0, DV, CHUNK):
            c = first + tl.arange(0, CHUNK)
            some = (split < parts // 2)[:, None] & (c < DV)[None, :]
            turned = tl.load(found + place[:, None] * DV + c[None, :], mask=some, other=0.0)
            turned = tl.sum(turned * weights[:, None], 0)
            of_some = (c < DV)[:, None] & (v < DV)[None, :]
            back = tl.load(matrix + c[:, None] * DV + v[None, :], mask=of_some, other=0.0)
            sums += tl.sum(turned[:, None] * back, 0)
    sums /= total
    tl.store(out + row * DV + v, sums.to(out.dtype.element_ty), mask=v < DV)
    tl.store(lse + row, highest + tl.log(total))
