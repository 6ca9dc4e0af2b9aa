"""What a layer must hold: drawn operations against transformers' `DynamicLayer`."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import strategies as st
from transformers import GPT2Config

from ..compat import DynamicLayer
from ..errors import CacheOverflow, Evicted
from ..factory import build
from ..layers.static import StaticLayer
from ..retention.base import Retention, Scored

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..spec import Strategy
from .tools import dense, normal, same, seeded


class Oracle:
    """One layer's cache as its contract describes it, written with `DynamicLayer` and indices only.

    It keeps every token ever seen, exact, and says which columns a query may see. `error` holds how
    far each stored token may be from exact; `follow` widens it as the layer encodes blocks.
    """

    def __init__(self, retention: Retention, padding: Tensor) -> None:
        self.retention, self.padding = retention, padding
        self.sinks = 0  # first tokens of each row that the layer keeps before its first block
        self.exact = DynamicLayer()
        self.keys_error: Tensor | None = None  # [B, H, T, Dk]
        self.values_error: Tensor | None = None
        self.encoded = (0, 0)  # columns that are encoded now

    @property
    def seen(self) -> int:
        return self.exact.get_seq_length()

    def update(self, keys: Tensor, values: Tensor) -> None:
        self.exact.update(keys, values)
        new = [torch.zeros_like(x) for x in (keys, values)]
        if self.keys_error is None:
            self.keys_error, self.values_error = new
        else:
            self.keys_error = torch.cat((self.keys_error, new[0]), 2)
            self.values_error = torch.cat((self.values_error, new[1]), 2)

    def follow(self, layer: Any) -> None:
        """Widen the error of the blocks encoded since the last call, by the codec's bound."""
        begin, end, data = layer.encoded()
        self.sinks = layer.sinks.count if layer.sinks is not None else 0
        if data is not None and end > self.encoded[1]:
            codec = layer.strategy.codec
            n = (end - max(begin, self.encoded[1])) // codec.block
            new = {name: x[:, :, -n:] for name, x in data.items()}
            for side, error in enumerate((self.keys_error, self.values_error)):
                bound = codec.max_error(new, side)
                shape = (*error.shape[:2], n, codec.block, error.shape[-1])
                error[:, :, end - n * codec.block : end] += bound.expand(shape).flatten(2, 3)
        self.encoded = (begin, end)

    def first_visible(self, seen: int | None = None) -> int:
        """The oldest column that the next query may see."""
        seen, newest = self.seen if seen is None else seen, self.retention.newest
        return 0 if newest is None else max(0, seen - (newest - 1) - self.retention.first)

    def visible(self, first: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Keys and values from column `first` on, each with its error; and which are sinks."""
        columns = torch.arange(first, self.seen).expand(len(self.padding), -1).clone()
        pinned = torch.zeros_like(columns, dtype=torch.bool)
        if self.retention.first and first > 0:
            for row, padding in enumerate(self.padding.tolist()):
                if first > padding:
                    n = self.retention.first
                    columns[row, :n] = torch.arange(padding, padding + n)
                    pinned[row, :n] = True

        def take(x: Tensor) -> Tensor:
            return x.gather(2, columns[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))

        exact, start = pinned, self.padding[:, None]
        if first == 0 and self.sinks and self.encoded[0] == self.sinks:
            exact = (columns >= start) & (columns < start + self.sinks)
        # padding before the first block is not held
        lost = (columns < start) & (columns < self.sinks) & ~pinned

        def off(error: Tensor) -> Tensor:
            error = take(error).masked_fill(exact[:, None, :, None], 0.0)
            return error.masked_fill(lost[:, None, :, None], torch.inf)

        sides = [
            (take(x), off(error))
            for x, error in (
                (self.exact.keys, self.keys_error),
                (self.exact.values, self.values_error),
            )
        ]
        return sides, pinned

    def crop(self, n: int) -> None:
        if n and self.seen:
            n = min(n, self.seen)
            keep = self.seen - n
            self.exact.crop(-n)
            self.keys_error = self.keys_error[:, :, :keep]
            self.values_error = self.values_error[:, :, :keep]
            # a cut block returns to the tail as it was stored: a later one adds its own error
            self.encoded = (min(self.encoded[0], keep), min(self.encoded[1], keep))

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.seen:
            self.exact.keys, self.exact.values = change(self.exact.keys), change(self.exact.values)
            self.keys_error, self.values_error = change(self.keys_error), change(self.values_error)
            self.padding = change(self.padding)


def one_layer(strategy: Strategy, padding: Tensor | None = None, limit: int = 256) -> Any:
    """A layer of this strategy, keys never rotated."""
    layer = build(strategy, GPT2Config(n_layer=1), max_cache_len=limit).layers[0]
    if padding is not None:
        layer.set_padding(padding)
    return layer


def kept_whole(retention: Retention, length: int) -> bool:
    """Whether nothing of `length` tokens is dropped."""
    if isinstance(retention, Scored):
        fewest = retention.budget if retention.heads is None else retention.least
        return length < fewest + retention.every
    return retention.newest is None or length <= retention.first + retention.newest


STEP = st.one_of(
    st.tuples(st.just("update"), st.sampled_from([1, 1, 1, 2, 3, 5, 8, 13, 20])),
    st.tuples(st.just("update"), st.just(1)),
    st.tuples(st.just("crop"), st.sampled_from([0, 1, 2, 5, 9, 30])),
    st.tuples(st.just("record"), st.just(0)),
    st.tuples(st.just("reorder"), st.integers(0, 5)),
    st.tuples(st.just("select"), st.integers(0, 5)),
    st.tuples(st.just("mask"), st.integers(0, 5)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("copy"), st.just(0)),
    st.tuples(st.just("reset"), st.just(0)),
)


# steps that reach each of them, and rollbacks that end in the tail, in a block and beyond one
EACH = [
    *(("update", n) for n in (13, 1, 1, 1, 8)), ("reorder", 1), ("update", 1), ("select", 3),
    ("update", 5), ("crop", 2), ("update", 1), ("record", 0), ("update", 9), ("crop", 5),
    *[("update", 1)] * 4, ("crop", 4), ("crop", 5), ("update", 1), ("crop", 9), ("repeat", 2),
    ("update", 3), ("mask", 2), ("crop", 13), ("copy", 0), ("update", 20), ("crop", 1),
    ("update", 1),
]  # fmt: skip


class Machine:
    """Runs drawn steps on a layer and its oracle, and compares them after each."""

    def __init__(self, strategy: Strategy, padding: list[int]) -> None:
        self.strategy = strategy
        self.start = torch.tensor(padding)
        self.layer = one_layer(strategy, self.start)
        self.oracle = Oracle(strategy.retention, self.start)
        self.since_settled = self.seed = 0
        self.recording = False
        self.returned: list[tuple[Tensor, Tensor]] = []  # by the last update, and what it was

    def run(self, steps: list[tuple[str, int]]) -> None:
        for name, n in steps:
            if name in ("reorder", "select", "mask", "repeat") and not self.oracle.seen:
                continue  # there are no rows yet
            getattr(self, name)(n)
            self.compare()

    def update(self, S: int) -> None:
        oracle, layer = self.oracle, self.layer
        limit = layer.strategy.layout.limit
        B = len(oracle.padding)
        self.seed += 1
        keys = normal(B, 2, S, 8, seed=self.seed)
        values = normal(B, 2, S, 6, seed=-self.seed)
        if limit is not None and oracle.seen + S > limit:
            with pytest.raises(CacheOverflow):
                layer.update(keys, values)
            return
        first = oracle.first_visible()
        length, offset = layer.get_mask_sizes(S)
        before, encoded = int(layer.get_seq_length()), layer.encoded()[1]
        got = layer.update(keys.clone(), values.clone())
        self.returned = [(x, dense(x).clone()) for x in got]
        assert before == oracle.seen
        oracle.update(keys, values)
        self.since_settled = self.since_settled + S if self.recording else 0
        assert offset == first
        sides, _ = oracle.visible(first)
        for x, (exact, error) in zip(got, sides, strict=True):
            assert x.shape[:2] == exact.shape[:2]
            assert x.shape[2] == length
            plain = dense(x)[:, :, : exact.shape[2]]  # a static layer returns empty room behind
            assert length in (exact.shape[2], limit)
            self.check(plain, exact, error)
            assert same(plain[:, :, -S:].contiguous(), exact[:, :, -S:]), "this call's own tokens"
        oracle.follow(layer)
        codec = layer.strategy.codec
        begin, end, _ = layer.encoded()
        if self.recording:
            assert end == encoded, "nothing is encoded before `crop`"
        elif layer.cuts_blocks and oracle.seen >= int(oracle.padding.max()) + oracle.sinks:
            first = max(codec.first, oracle.retention.first)
            assert oracle.seen - max(end, begin, first) <= codec.tail + codec.block - 1
        if end > encoded:
            assert oracle.seen - end >= codec.tail, "the newest tokens are not encoded yet"

    def crop(self, n: int) -> None:
        oracle = self.oracle
        left = max(0, oracle.seen - n)
        try:
            self.layer.crop(-n)
        except Evicted:
            assert n > self.since_settled, "nothing since the last settled call can be gone"
            assert oracle.first_visible(left) < oracle.first_visible(), "nothing needed was gone"
            return
        oracle.crop(n)
        self.since_settled = 0
        oracle.follow(self.layer)

    def record(self, _: int) -> None:
        if hasattr(self.layer, "activate_past_recording"):
            self.layer.activate_past_recording()
            self.recording = True

    def rows_change(self) -> None:
        """A static layer changes its rows in place: a compiled graph knows the address."""
        if isinstance(self.layer, StaticLayer):
            self.returned = []

    def reorder(self, seed: int) -> None:
        self.rows_change()
        B = len(self.oracle.padding)
        order = torch.randint(0, B, (B,), generator=seeded(seed))
        self.layer.reorder_cache(order)
        self.oracle.map(lambda x: x[order])

    def select(self, seed: int) -> None:
        self.rows_change()
        B = len(self.oracle.padding)
        order = torch.randperm(B, generator=seeded(seed))[: max(1, B - seed % 2)]
        self.layer.batch_select_indices(order)
        self.oracle.map(lambda x: x[order])

    def mask(self, seed: int) -> None:
        self.rows_change()
        B = len(self.oracle.padding)
        keep = torch.rand(B, generator=seeded(seed)) < 0.8
        keep[seed % B] = True
        self.layer.batch_select_indices(keep)
        self.oracle.map(lambda x: x[keep])

    def repeat(self, repeats: int) -> None:
        if len(self.oracle.padding) * repeats <= 6:
            self.layer.batch_repeat_interleave(repeats)
            self.oracle.map(lambda x: x.repeat_interleave(repeats, 0))

    def copy(self, _: int) -> None:
        """Go on with the copy; what happens to the original must not matter."""
        old, self.layer = self.layer, copy.deepcopy(self.layer)
        limit = old.strategy.layout.limit
        if self.oracle.seen and (limit is None or self.oracle.seen < limit):
            B = len(self.oracle.padding)
            self.returned = []
            old.update(torch.full((B, 2, 1, 8), 9.0), torch.full((B, 2, 1, 6), 9.0))

    def reset(self, _: int) -> None:
        self.layer.reset()
        self.recording = False
        # as many rows next time: a static layer keeps its room, and with it the batch
        padding = torch.zeros_like(self.oracle.padding)
        self.oracle = Oracle(self.strategy.retention, padding)
        self.since_settled = 0

    def compare(self) -> None:
        layer, oracle = self.layer, self.oracle
        self.check_returned()
        assert int(layer.get_seq_length()) == oracle.seen
        if oracle.seen == 0:
            return
        first = oracle.first_visible()
        assert layer.held() == oracle.seen - first
        sides, _ = oracle.visible(first)
        for x, (exact, error) in zip((layer.keys, layer.values), sides, strict=True):
            self.check_returned()  # reading what is held is no update
            if layer.strategy.layout.limit is not None:
                x = x[:, :, : exact.shape[2]]
            self.check(x, exact, error)

    def check_returned(self) -> None:
        for x, then in self.returned:
            assert same(dense(x).contiguous(), then), "what `update` returned has changed"

    def check(self, x: Tensor, exact: Tensor, error: Tensor) -> None:
        assert x.shape == exact.shape
        assert x.dtype == exact.dtype
        over = (x - exact).abs() - error * (1 + 1e-6)
        # two roundings to float32 on top where a token was encoded at all
        slack = torch.where(error > 0, 1e-6, 0.0)
        assert (over <= slack).all(), f"{float(over.max()):.3g} above the bound"


def budget(retention: Retention) -> int:
    """Most tokens held between two calls."""
    if isinstance(retention, Scored):
        return retention.budget + retention.every - 1
    return retention.first + retention.newest - 1
