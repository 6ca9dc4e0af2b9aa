"""What always holds of a single layer: counts, blocks, memory, any operations in any order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ..retention.base import Scored
from ..spec import Strategy, parse
from .memory import peak_bytes
from .oracle import EACH, STEP, Machine, budget, kept_whole, one_layer
from .tools import DRAWN, attended, normal, same


class OnLayers:
    """The part of `StrategyConformance` that no model goes through; its fixtures."""

    def test_masks_counts_and_shapes_agree(self, strategy: Strategy) -> None:
        """`get_mask_sizes` announces what `update` returns, `held` what a query finds."""
        layer, seen = one_layer(strategy), 0
        for S in (5, 1, 1, 9, 1, 17, 2, *[1] * 12):
            length, offset = layer.get_mask_sizes(S)
            held = layer.held()
            new = normal(2, 2, S, 8, seed=S), normal(2, 2, S, 6, seed=S)
            keys, values = attended(layer, *new)
            seen += S
            assert keys.shape == (2, 2, length, 8)
            assert values.shape == (2, 2, length, 6)
            assert int(layer.get_seq_length()) == seen
            limit = layer.strategy.layout.limit
            assert length in (held + S, limit)
            assert offset == seen - S - held
        limit = layer.get_max_length()
        assert limit == -1 or limit >= layer.held()

    def test_append_only(self, strategy: Strategy) -> None:
        """A block is encoded once, and its bytes never change while more tokens come."""
        if isinstance(strategy.retention, Scored):
            pytest.skip(f"{strategy.retention}: blocks have no column; see RetentionConformance")
        layer, kept = one_layer(strategy), {}
        codec = layer.strategy.codec
        for step, S in enumerate((3, 20, 1, 1, 1, 7, 2, *[1] * 40, 13)):
            attended(layer, normal(2, 2, S, 8, seed=step), normal(2, 2, S, 6, seed=-step))
            begin, end, data = layer.encoded()
            if data is None:
                continue
            for i, column in enumerate(range(begin, end, codec.block)):
                now = {name: x[:, :, i].clone() for name, x in data.items()}
                before = kept.setdefault(column, now)
                assert all(same(now[name], x) for name, x in before.items()), f"block at {column}"
        if not layer.cuts_blocks:
            assert layer.stats.blocks_encoded == len(kept) == 0
            pytest.skip(f"{strategy}: cuts no blocks")
        assert layer.stats.blocks_encoded >= len(
            kept
        )  # some were dropped before they were seen here
        if strategy.retention.newest is None:
            assert layer.stats.blocks_encoded == len(kept)
        if codec.tail + codec.block < layer.held():
            assert kept, "nothing was ever encoded"

    def test_no_dense_copy(self, strategy: Strategy) -> None:
        """A decode step allocates about a block, however much is held.

        Measured over a layer's update and attention in steps one after the other; the median, since
        room grows now and then.
        """
        B, H, D, steps = 1, 2, 32, 7
        retention = strategy.retention
        whole = kept_whole(retention, 650)
        held = 600 if whole else budget(retention)
        layer = one_layer(strategy, limit=640)
        codec = layer.strategy.codec
        attended(layer, *(normal(B, H, held, D, seed=s) for s in (0, 1)))
        token = normal(B, H, 1, D, seed=2)

        def step() -> None:
            length, offset = layer.get_mask_sizes(1)
            visible = torch.arange(offset, offset + length) <= int(layer.get_seq_length())
            sdpa(token, *layer.update(token, token), attn_mask=visible.view(1, 1, 1, length))

        peaks = sorted(peak_bytes(step) for _ in range(steps))
        row = 2 * B * H * D * 4
        # a block being decoded, the pieces of it and the tail being encoded; masks and scores
        allowed = (
            6 * row * (codec.block + codec.tail if layer.cuts_blocks else 1) + 64 * held + 4096
        )
        if allowed > row * held // 2:
            if whole:
                pytest.fail(f"blocks of {codec} are too large for this test")
            pytest.skip(f"{retention}: holds too little to tell a copy from a block")
        assert peaks[steps // 2] <= allowed, f"{peaks} bytes; {row * held} are held"

    @given(
        steps=st.lists(STEP, min_size=3, max_size=24),
        padding=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    )
    @example(steps=EACH, padding=[0, 2, 1])
    @settings(DRAWN, max_examples=40)
    def test_any_sequence_of_operations(
        self, spec: str, steps: list[tuple[str, int]], padding: list[int]
    ) -> None:
        """Drawn operations on a layer against transformers' `DynamicLayer`.

        Exact where the codec is; else each token within the sum of the bounds of the blocks it was
        encoded in; the tail, sinks and the call's own tokens always exact.
        """
        strategy = parse(spec)
        if isinstance(strategy.retention, Scored):
            pytest.skip(f"{strategy.retention}: chooses by content; see RetentionConformance")
        Machine(strategy, padding).run([("update", 6), *steps, ("update", 1)])
