"""What is kept, what a query may see, rollback, rows and copies."""

from .defect import Defect

LAYER = ("tests/test_retention.py", "tests/test_strategies.py", "-k", "operations or crop or seen")
DRAWN = ("tests/test_strategies.py", "-k", "any_sequence_of_operations")
SINKS = ("tests/test_retention.py", "-k", "sinks")

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
        "return _best(score, n).sort(dim=-1).values",
        "return _best(score, n).sort(dim=-1, descending=True).values",
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
        "            x.check_rollback(n)\n",
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
        "{name: change(x) for name, x in self.read().items()}",
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
]
