"""Defects that the tests must notice, for `scripts/mutate.py`: a text, and what replaces it.

Where a file has changed so that a text is gone, the defect is written anew in its words; where it
can no longer be made, another one of its kind takes its place.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SLOW = {"NUMBA_DISABLE_JIT": "1"}  # not compiled anew for each defect
INTERPRETED = {"TRITON_INTERPRET": "1"}

LAYER = ("tests/test_retention.py", "tests/test_strategies.py", "-k", "operations or crop or seen")
DRAWN = ("tests/test_strategies.py", "-k", "any_sequence_of_operations")
CODECS = ("tests/test_codecs.py", "-k", "not traces and not compiler")
ORACLE = ("tests/test_kernels.py", "-k", "reference and (dense or loops)")
PLAIN = ("tests/test_kernels.py", "-k", "numba and (loops or borders or nothing or merge)")
TRITON = ("tests/test_triton.py", "-k", "shares or many_queries or lowest or other_blocks")
SINKS = ("tests/test_retention.py", "-k", "sinks")
PREFIX = ("tests/test_prefix.py",)
STATIC = ("tests/test_static.py", "-k", "compiled_once and eager or trace")


@dataclass(frozen=True)
class Defect:
    """What is planted, and the arguments of pytest that should turn red."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)


DEFECTS = [
    # what is kept, and what a query may see
    Defect(
        "a window is one token short",
        "kvplug/layers/columns.py",
        "self.seen - n - (retention.newest - 1) - retention.first",
        "self.seen - n - (retention.newest - 2) - retention.first",
        LAYER,
    ),
    Defect(
        "a mask starts a column late",
        "kvplug/layers/growing.py",
        "return self.seen - first + query_length, first",
        "return self.seen - first + query_length, first + bool(first)",
        LAYER,
    ),
    Defect(
        "sinks are lost to tokens that come later",
        "kvplug/layers/sinks.py",
        "self.values = torch.where(here, _gather(values, column), self.values)",
        "self.values = _gather(values, column)",
        SINKS,
    ),
    Defect(
        "sinks of a padded row are its padding",
        "kvplug/layers/sinks.py",
        "column = padding[:, None] + sinks - seen",
        "column = 0 * padding[:, None] + sinks - seen",
        SINKS,
    ),
    Defect(
        "sinks are turned one position too far",
        "kvplug/layers/sinks.py",
        "by = column - padding",
        "by = column - padding + 1",
        SINKS,
    ),
    Defect(
        "padding is one token longer",
        "kvplug/cache.py",
        "(attention_mask.long().cumsum(-1) == 0).sum(-1)",
        "(attention_mask.long().cumsum(-1) <= 1).sum(-1)",
        ("tests/test_strategies.py", "tests/test_host.py", "-k", "padded or padding"),
    ),
    Defect(
        "tokens chosen by score are out of order",
        "kvplug/retention/base.py",
        "return order, ~chosen.gather(-1, order)",
        "return order.flip(-1), ~chosen.gather(-1, order).flip(-1)",
        ("tests/test_retention.py", "-k", "Scored or scored"),
    ),
    Defect(
        "padding is chosen by its score too",
        "kvplug/retention/base.py",
        "return score.masked_fill(~tokens.real, -torch.inf)",
        "return score",
        ("tests/test_retention.py", "-k", "Scored or scored"),
    ),
    Defect(
        "a mask that is too long is cut at its end",
        "kvplug/attention/mask.py",
        "mask = pad(mask, (T - mask.shape[-1], 0), value=visible)",
        "mask = pad(mask, (0, T - mask.shape[-1]), value=visible)",
        (
            *("tests/test_retention.py", "tests/test_view.py", "tests/test_returned.py"),
            *("-k", "mask or length or padded"),
        ),
    ),
    Defect(
        "queries that were rolled back choose tokens",
        "kvplug/layers/scored.py",
        "        self.queries.drop_last(min(n, len(self.queries)))\n",
        "",
        ("tests/test_retention.py", "-k", "rollback"),
    ),
    Defect(
        "queries are waited for and nobody is asked",
        "kvplug/layers/growing.py",
        "        self._unseen = S\n",
        "        self._unseen = 0\n",
        ("tests/test_feedback.py", "-k", "prompt or without_attention"),
    ),
    Defect(
        "heads of unlike budgets come back in the order of their groups",
        "kvplug/attention/heads.py",
        "[joined.index(head) for head in range(self.count)]",
        "list(range(self.count))",
        ("tests/test_ragged.py", "-k", "each_alone"),
    ),
    Defect(
        "heads are rolled back though others cannot be",
        "kvplug/layers/ragged.py",
        "            x._check_rollback(n)\n",
        "            pass\n",
        ("tests/test_ragged.py", "-k", "one_group"),
    ),
    # rollback, rows and copies
    Defect(
        "crop forgets one token less",
        "kvplug/layers/growing.py",
        "self.tail.drop_last(n)\n",
        "self.tail.drop_last(max(n - 1, 0))\n",
        LAYER,
    ),
    Defect(
        "crop cuts a block and keeps its own tail",
        "kvplug/layers/growing.py",
        'torch.cat((values.flatten(2, 3).to(self.dtype), rows["v"]), dim=2)',
        'torch.cat((keys.flatten(2, 3).to(self.dtype)[..., : rows["v"].shape[-1]], rows["v"]), 2)',
        LAYER,
    ),
    Defect(
        "a static layer's crop leaves the block it cuts",
        "kvplug/layers/static_coded.py",
        "self.block_count.fill_(n)",
        "self.block_count.fill_(n + 1)",
        DRAWN,
    ),
    Defect(
        "beams reorder keys and not values",
        "kvplug/layers/buffer.py",
        "{n: change(x) for n, x in self.read().items()}",
        '{n: x if n == "v" and change(x).shape == x.shape else change(x)'
        " for n, x in self.read().items()}",
        DRAWN,
    ),
    Defect(
        "a copy shares its blocks",
        "kvplug/layers/buffer.py",
        "            self._reallocate(max(n, capacity, self.reserve), rows)\n"
        "            self.append(rows)\n",
        "            self.tensors, self.end = dict(rows), n\n",
        ("tests/test_strategies.py", "tests/test_buffer.py", "-k", "copy or deepcopy"),
    ),
    Defect(
        "views move when blocks come",
        "kvplug/layers/buffer.py",
        "if self.steady:",
        "if False:",
        ("tests/test_strategies.py", "-k", "outlive"),
    ),
    Defect(
        "a block brought ahead is stale",
        "kvplug/layers/growing.py",
        "        self._fetched = None  # a copy of blocks as they were\n",
        "",
        ("tests/test_layer.py", "-k", "under_way"),
    ),
    Defect(
        "a window that slides in place keeps what was rolled back",
        "kvplug/layers/static_sliding.py",
        "x[:, :, have - held : have].clone()",
        "x[:, :, x.shape[2] - held :].clone()",
        ("tests/test_architectures.py", "-k", "roll_back or (native and static)"),
    ),
    # how it is stored
    Defect(
        "a block is encoded a token early",
        "kvplug/layers/growing.py",
        "n = len(self.tail) - front - (codec.tail if tail is None else tail)",
        "n = len(self.tail) - front - max((codec.tail if tail is None else tail) - 1, 0)",
        ("tests/test_layer.py", "tests/test_strategies.py", "-k", "tail or blocks"),
    ),
    Defect(
        "keys that swing get no more bits",
        "kvplug/codecs/guard.py",
        "MOST = 2.0 ",
        "MOST = 2e9 ",
        ("tests/test_guard.py",),
    ),
    Defect(
        "blocks that are loaded are read at the width asked for",
        "kvplug/codecs/rotated.py",
        'return self._wide(data["k_codes"].shape[-1] * 8 // self.block)',
        "return self",
        ("tests/test_guard.py", "-k", "copies or chunks"),
    ),
    Defect(
        "the CUDA kernel takes another bit of a plane",
        "kvplug/kernels/triton/decode.py",
        "(token % 8).to(tl.uint8)",
        "(token % 4).to(tl.uint8)",
        ("tests/test_triton.py", "-k", "default_blocks"),
        INTERPRETED,
    ),
    Defect(
        "a scale is made for one code more",
        "kvplug/codecs/quantize.py",
        "scale = -_round_down(-(high - zero.float()) / (2**bits - 1))",
        "scale = -_round_down(-(high - zero.float()) / 2**bits)",
        CODECS,
    ),
    Defect(
        "codes come out in another order",
        "kvplug/codecs/formats.py",
        "for shift in range(0, 8, bits)]",
        "for shift in reversed(range(0, 8, bits))]",
        CODECS,
    ),
    Defect(
        "a codec claims twice the error it makes",
        "kvplug/codecs/quantize.py",
        "return scale.float() / 2 + ",
        "return scale.float() + ",
        CODECS,
    ),
    Defect(
        "hidden tokens of the first block are read",
        "kvplug/attention/stored.py",
        "yield keys.flatten(2, 3)[:, :, skip:], values.flatten(2, 3)[:, :, skip:]",
        "yield keys.flatten(2, 3)[:, :, skip:], values.flatten(2, 3).roll(skip, 2)[:, :, skip:]",
        ORACLE,
    ),
    Defect(
        "a tail of one token is dropped",
        "kvplug/attention/stored.py",
        "        if self.tail[0].shape[2]:\n            yield self.tail",
        "        if self.tail[0].shape[2] > 1:\n            yield self.tail",
        ("tests/test_kernels.py", "-k", "reference and borders"),
    ),
    Defect(
        "a compiled step encodes a token late",
        "kvplug/layers/static_coded.py",
        "due = row + 1 == R",
        "due = row + 2 == R",
        STATIC,
    ),
    Defect(
        "disk keeps blocks in memory",
        "kvplug/placement/disk.py",
        "shared=True",
        "shared=False",
        ("tests/test_placement.py", "-k", "mapped"),
    ),
    # how attention reads it
    Defect(
        "a view gives a head to the wrong queries",
        "kvplug/attention/view.py",
        "dense.repeat_interleave(self._repeats, dim=1)",
        "dense.repeat(1, self._repeats, 1, 1)",
        ("tests/test_view.py",),
    ),
    Defect(
        "a view loses the mask on the way",
        "kvplug/attention/view.py",
        "rest = mask, scale, is_causal",
        "rest = None, scale, is_causal",
        ("tests/test_view.py",),
    ),
    Defect(
        "the reference takes the default scale",
        "kvplug/kernels/reference.py",
        "(D**-0.5 if scale is None else scale)",
        "D**-0.5",
        ORACLE,
    ),
    Defect(
        "the reference forgets what it has summed",
        "kvplug/kernels/reference.py",
        "total = total * keep + weights.sum(-1, keepdim=True)",
        "total = total + weights.sum(-1, keepdim=True)",
        ORACLE,
    ),
    Defect(
        "the CPU kernel ignores a mask of booleans",
        "kvplug/kernels/numba/attend.py",
        "if byte_at(row, i) == 0:",
        "if byte_at(row, i) == 2:",
        PLAIN,
        SLOW,
    ),
    Defect(
        "the CPU kernel reads the next row of queries",
        "kvplug/kernels/numba/attend.py",
        "row_at(query.rows, b, h * G + (first + r) // S, (first + r) % S, size)",
        "row_at(query.rows, b, h * G + (first + r) % G, (first + r) % S, size)",
        PLAIN,
        SLOW,
    ),
    Defect(
        "the CPU kernel takes a neighbour's zero",
        "kvplug/kernels/numba/decode.py",
        "put(out, i, np.float32((byte_at(codes, i) >> shift) & keep) * scale + zero)",
        "put(out, i, np.float32((byte_at(codes, i) >> shift) & keep) * scale)",
        ("tests/test_kernels.py", "-k", "otherwise"),
        SLOW,
    ),
    Defect(
        "the CUDA kernel sees one column ahead",
        "kvplug/kernels/triton/attend.py",
        'tl.where(column[None, :] <= s[:, None], scores, -float("inf"))',
        'tl.where(column[None, :] <= s[:, None] + 1, scores, -float("inf"))',
        TRITON,
        INTERPRETED,
    ),
    Defect(
        "the CUDA kernel reads hidden tokens",
        "kvplug/kernels/triton/attend.py",
        "held & (token >= 0)",
        "held & (token >= -1)",
        TRITON,
        INTERPRETED,
    ),
    # gradients
    Defect(
        "a cache that passes no gradient says nothing",
        "kvplug/layers/growing.py",
        "if self.cuts_blocks and recorded(*new):",
        "if False and recorded(*new):",
        ("tests/test_gradients.py", "-k", "refuse"),
    ),
    # what outlives a call
    Defect(
        "a chunk that was computed goes on unencoded",
        "kvplug/prefix.py",
        "                layer.seal()\n",
        "                pass\n",
        (*PREFIX, "-k", "warm and one and device"),
    ),
    Defect(
        "all of a prompt comes from the store",
        "kvplug/prefix.py",
        "length - self.first - self.tail)",
        "length - self.first)",
        (*PREFIX, "-k", "turn"),
    ),
    Defect(
        "tenants share their chunks",
        "kvplug/prefix.py",
        "self.chunk, reuse.salt, reuse.verify",
        'self.chunk, "", reuse.verify',
        (*PREFIX, "-k", "tenants"),
    ),
    Defect(
        "chunks are found behind other first tokens",
        "kvplug/prefix.py",
        "begin[0] if begin else self.root, row",
        "self.root, row",
        (*PREFIX, "-k", "first_token"),
    ),
    Defect(
        "each chunk begins at position 0",
        "kvplug/prefix.py",
        "torch.arange(a, b, device",
        "torch.arange(0, b - a, device",
        (*PREFIX, "-k", "turn"),
    ),
    Defect(
        "a mask with holes is served",
        "kvplug/prefix.py",
        "(mask.diff(dim=-1) < 0).any() or ",
        "",
        (*PREFIX, "-k", "does_not_serve"),
    ),
    Defect(
        "tensors of a chunk are read by their place",
        "kvplug/layers/state.py",
        "found = sorted(part(state, prefix).items())",
        "found = part(state, prefix).items()",
        ("tests/store/test_store_calls.py", "-k", "place"),
    ),
    Defect(
        "a record under another's name is taken for it",
        "kvplug/store/record.py",
        "    if inside != key:\n",
        "    if inside is None:\n",
        ("tests/store/test_store_record.py", "tests/store/test_store_failures.py"),
    ),
    Defect(
        "a record of another format is read",
        "kvplug/store/record.py",
        "    if magic != MAGIC:\n",
        "    if magic is None:\n",
        ("tests/store/test_store_record.py",),
    ),
    Defect(
        "a key leaves out the chunks before",
        "kvplug/store/keys.py",
        "link = hashlib.sha256(last)",
        "link = hashlib.sha256(root)",
        ("tests/store/test_store_keys.py",),
    ),
    Defect(
        "weights that change in place keep their digest",
        "kvplug/store/weights.py",
        "-1 if x.is_inference() else x._version",
        "-1",
        ("tests/store/test_store_keys.py",),
    ),
    Defect(
        "the first of a chain is evicted first",
        "kvplug/store/index.py",
        "last + len(chain) - i, hits, key",
        "last + 1 + i, hits, key",
        ("tests/store/test_store_bounds.py",),
    ),
    Defect(
        "what is written anew stays on the disk meanwhile",
        "kvplug/store/index.py",
        "drop([*gone, *old])",
        "drop(gone)",
        ("tests/store/test_store_bounds.py", "-k", "anew_leaves"),
    ),
    Defect(
        "a salt is not in the root",
        "kvplug/store/keys.py",
        "    return tag(salt) + hashlib",
        "    return tag('') + hashlib",
        ("tests/store/test_store_keys.py",),
    ),
]
