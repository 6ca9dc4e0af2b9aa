"""The compiled kernel: what is stored, tile by tile, under an online softmax (arXiv:1805.02867).

Work is split over batch, heads, row tiles and, where these leave cores idle, the sequence; the
splits are merged by their log-sum-exp (flash decoding). Addresses, sizes and strides are integers.
"""

import math

import numpy as np
from numba import prange

from .arguments import codes_from, mask_from, query_from, tokens_from
from .decode import decode_keys, decode_values, in_vectors, number, row_at, take, take_scales
from .products import add_coded_values, add_products, floats, key_codes, turn
from .simd import (
    LANES,
    byte_at,
    exp2,
    float_at,
    larger,
    largest,
    load,
    load_codes,
    multiply_add,
    put,
    spread,
    store,
    total,
    where_positive,
)
from .tiles import (
    LOG2E,
    LOWEST,
    ONE,
    ROWS,
    TILE,
    ZERO,
    in_lanes,
    inlined,
    partial_of,
    scratch_of,
)


def attend(shape, plan, query, scale, head, plain, codes, tail, mask, memory):
    """All of one call; tuples are flat, `arguments.py` has the names.

    shape: batch, stored heads, queries per head, new tokens, channels of keys and of values, and
        these padded to whole vectors
    plan: tiles of a head's rows, splits of a sequence, workers
    memory: addresses of scratch, output [B, G * H, S, Dv] and log-sum-exp [B, G * H, S] in float32
    """
    B, H, _, _, Dk, _, width = shape
    row_tiles, splits, workers = plan
    room, out, lse = memory
    partials = room + 4 * workers * scratch_of(Dk, width)
    step = 4 * partial_of(width)
    groups = B * H * row_tiles
    tasks = groups * splits
    for worker in prange(workers):
        scratch = room + 4 * worker * scratch_of(Dk, width)
        for task in range(worker * tasks // workers, (worker + 1) * tasks // workers):
            group, split = task // splits, task % splits
            results = partials + step * (worker if splits == 1 else task)
            _attend_split(
                shape, row_tiles, group, splits, split,
                query, scale, head, plain, codes, tail, mask, scratch, results,
            )  # fmt: skip
            if splits == 1:
                _merge(results, 1, shape, row_tiles, group, out, lse)
    if splits > 1:
        for group in range(groups):
            results = partials + step * group * splits
            _merge(results, splits, shape, row_tiles, group, out, lse)


@inlined
def _rows(shape, row_tiles, group):
    """Batch, head, first row and number of rows of a group: rows are the G * S of a head."""
    _, H, G, S, _, _, _ = shape
    first = group % row_tiles * ROWS
    return group // row_tiles // H, group // row_tiles % H, first, min(ROWS, G * S - first)


@inlined
def _attend_split(
    shape, row_tiles, group, splits, split,
    query, scale, head, plain, codes, tail, mask, scratch, results,
):  # fmt: skip
    """Online softmax (arXiv:1805.02867) of a group of rows over its share of the tiles."""
    query, mask, codes = query_from(query), mask_from(mask), codes_from(codes)
    head, plain, tail = tokens_from(head), tokens_from(plain), tokens_from(tail)
    _, _, G, S, Dk, Dv, width = shape
    b, h, first, rows = _rows(shape, row_tiles, group)
    keys = scratch
    values = keys + 4 * TILE * Dk
    queries = values + 4 * TILE * width
    q_step = in_lanes(Dk)
    plain_queries = queries + 4 * ROWS * q_step  # while `queries` are turned
    scores = plain_queries + 4 * ROWS * q_step
    highest, sums, sides = results, results + 4 * ROWS, results + 8 * ROWS
    for r in range(max(rows, 2)):
        put(highest, r, LOWEST)
        put(sums, r, ZERO)
        for d in range(0, width, LANES):
            store(sides, r * width + d, spread(ZERO))
    _take_queries(query, scale, b, h, G, S, first, rows, Dk, q_step, queries)

    # codes first, so that what they gave is turned back once
    of_codes = _tiles(codes.count, codes.skip)
    before_plain = of_codes + _tiles(head.count, head.skip)
    before_tail = before_plain + _tiles(plain.count, plain.skip)
    tiles = before_tail + _tiles(tail.count, tail.skip)
    begin, end = split * tiles // splits, (split + 1) * tiles // splits
    to_turn_back = codes.turn != 0 and begin < min(end, of_codes)
    if to_turn_back:
        _copy_rows(queries, max(rows, 2) * q_step, plain_queries)
        turn(plain_queries, q_step, max(rows, 2), Dk, codes.turn, q_step, queries)
    # many rows: a tile is decoded faster once than with every two of them
    vectors = of_codes > 0 and rows <= ROWS // 2 and in_vectors(codes, Dv)
    for tile in range(begin, end + 1):
        if to_turn_back and tile == min(of_codes, end):
            turn(sides, width, rows, Dv, codes.turn_back, width, values)
            _copy_rows(values, rows * width, sides)
            # not two addresses to choose from: numba 0.68 compiles that choice wrongly
            _copy_rows(plain_queries, max(rows, 2) * q_step, queries)
            to_turn_back = False
        if tile == end:
            break
        # from which of its source's tokens on, how many, and at which column; then where its values
        # are, and how many numbers from one to the next, if not in codes
        in_codes = False
        if tile < of_codes:
            start, n, column = _span(codes.count, codes.skip, tile)
            column += head.count
            in_codes = vectors and n == TILE and start % TILE == 0
            if in_codes:
                take_scales(codes, b, h, start, Dk, keys, values)
            else:
                decode_keys(codes, b, h, start, n, Dk, keys)
                decode_values(codes, b, h, start, n, Dv, width, values)
            found, step = values, width
        else:
            if tile < before_plain:
                source, earlier, columns = head, of_codes, 0
            elif tile < before_tail:
                source, earlier, columns = plain, before_plain, head.count
            else:
                source, earlier = tail, before_tail
                columns = head.count + plain.count - plain.skip + codes.count - codes.skip
            start, n, column = _span(source.count, source.skip, tile - earlier)
            column += columns
            found, step = take(source, b, h, start, n, Dk, Dv, width, keys, values)
        r = 0
        while r < rows:
            some = 3 if (rows - r) % 2 and rows - r > 1 else 2  # two by two; first three if odd
            s = scores + 4 * r * TILE
            for c in range(0, some * TILE, LANES):
                store(s, c, spread(ZERO))
            q = queries + 4 * r * q_step
            if in_codes:
                matrix = key_codes(codes, b, h, start, keys, Dk)
                add_products(q, q_step, some, Dk, matrix, TILE, s)
            else:
                add_products(q, q_step, some, Dk, floats(keys, TILE), TILE, s)
            for i in range(r, min(r + some, rows)):
                s = scores + 4 * i * TILE
                _hide(mask, b, h * G + (first + i) // S, (first + i) % S, column, n, s)
                _softmax(s, highest, sums, i, sides + 4 * i * width, width)
            s, side = scores + 4 * r * TILE, sides + 4 * r * width
            if in_codes:
                add_coded_values(codes, b, h, start, s, some, Dv, values, side)
            else:
                add_products(s, TILE, some, n, floats(found, step), width, side)
            r += some


@inlined
def _tiles(count, skip):
    """Tiles that `count` tokens make, the first `skip` hidden; tiles start at multiples of TILE."""
    return (count + TILE - 1) // TILE - skip // TILE


@inlined
def _span(count, skip, tile):
    """First token of a tile, how many, and how many visible ones are before it."""
    aligned = (skip // TILE + tile) * TILE
    start = max(skip, aligned)
    return start, min(count, aligned + TILE) - start, start - skip


@inlined
def _take_queries(query, scale, b, h, G, S, first, rows, Dk, step, out):
    """Scaled rows [rows, Dk] of the head, `step` apart; a row of zeros beside a single one."""
    size = 4 if query.number == 0 else 2
    for r in range(rows):
        row = row_at(query.rows, b, h * G + (first + r) // S, (first + r) % S, size)
        for d in range(Dk):
            put(out, r * step + d, np.float32(number(row, d, query.number) * scale))
    if rows == 1:
        for d in range(Dk):
            put(out, step + d, ZERO)


@inlined
def _copy_rows(x, n, out):
    """out[:n] = x[:n], floats in whole vectors."""
    for i in range(0, n, LANES):
        store(out, i, load(x, i))


@inlined
def _hide(mask, b, q, s, column, n, scores):
    """Apply the mask to the scores of n columns; those after them in the tile are hidden."""
    if mask.kind == 1:
        row = row_at(mask.rows, b, q, s, 1) + column
        whole = n - n % LANES
        for i in range(0, whole, LANES):
            seen = load_codes(row, i, 0, 255)
            store(scores, i, where_positive(seen, load(scores, i), spread(LOWEST)))
        for i in range(whole, n):
            if byte_at(row, i) == 0:
                put(scores, i, LOWEST)
    elif mask.kind == 2:
        row = row_at(mask.rows, b, q, s, 4) + 4 * column
        for i in range(n):
            put(scores, i, float_at(scores, i) + float_at(row, i))
    for i in range(n, TILE):
        put(scores, i, LOWEST)


@inlined
def _softmax(scores, highest, sums, r, side, width):
    """Scores of a tile -> weights, relative to the row's new maximum; what it has is rescaled."""
    best = load(scores, 0)
    for c in range(LANES, TILE, LANES):
        best = larger(load(scores, c), best)
    old, new = float_at(highest, r), largest(best)
    if new > old:
        shrink = np.float32(math.exp(old - new))
        put(highest, r, new)
        put(sums, r, float_at(sums, r) * shrink)
        for d in range(0, width, LANES):
            store(side, d, multiply_add(load(side, d), spread(shrink), spread(ZERO)))
    base = max(old, new)
    if base == LOWEST:  # nothing visible yet: exp(-inf - 0) = 0, not NaN
        base = ZERO
    added = spread(ZERO)
    for c in range(0, TILE, LANES):
        above = multiply_add(load(scores, c), spread(ONE), spread(-base))
        weight = exp2(multiply_add(above, spread(LOG2E), spread(ZERO)))
        store(scores, c, weight)
        added = multiply_add(weight, spread(ONE), added)
    put(sums, r, float_at(sums, r) + total(added))


@inlined
def _merge(results, splits, shape, row_tiles, group, out, lse):
    """Results of all splits of a group -> its rows of the output and of the log-sum-exp."""
    _, H, G, S, _, Dv, width = shape
    b, h, first, rows = _rows(shape, row_tiles, group)
    row = (b * H + h) * G * S + first
    out, lse = out + 4 * row * Dv, lse + 4 * row
    step = 4 * partial_of(width)
    for r in range(rows):
        highest = LOWEST
        for split in range(splits):
            highest = max(highest, float_at(results + split * step, r))
        whole = ZERO
        for d in range(Dv):
            put(out, r * Dv + d, ZERO)
        for split in range(splits):
            here = results + split * step
            if float_at(here, r) > LOWEST:
                share = np.float32(math.exp(float_at(here, r) - highest))
                whole += share * float_at(here + 4 * ROWS, r)
                side = here + 8 * ROWS + 4 * r * width
                for d in range(Dv):
                    put(out, r * Dv + d, float_at(out, r * Dv + d) + share * float_at(side, d))
        if whole == 0:
            put(lse, r, LOWEST)
            continue
        for d in range(Dv):
            put(out, r * Dv + d, float_at(out, r * Dv + d) / whole)
        put(lse, r, highest + np.float32(math.log(whole)))
