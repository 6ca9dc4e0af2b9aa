"""The contract of a retention method."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import DynamicCache

from ..codecs.exact import Exact
from ..compat import cache_argument
from ..errors import Evicted
from ..factory import build
from ..kernels.reference import Reference
from ..layers.layout import Growing
from ..placement.device import Device
from ..registry import REGISTRIES
from ..retention.base import Retention, Scored
from ..spec import PREFIX, Strategy, parse
from .affine import Affine
from .chosen import ChosenOracle
from .memory import walked_bytes
from .oracle import one_layer
from .tools import (
    assert_close,
    attended,
    dense,
    left_padded,
    normal,
    prompt,
    raw_bytes,
    same,
    tiny_llama,
)

if TYPE_CHECKING:
    from ..codecs.base import Codec


class RetentionConformance:
    """The contract of `kvplug.Retention` and `kvplug.Scored`. Override the fixture `retention`.

    Use a small budget (tens of tokens): the tests go a few times beyond it.
    """

    @pytest.fixture
    def retention(self) -> Retention:
        """The retention under test."""
        raise NotImplementedError("override the fixture 'retention'")

    @pytest.fixture
    def strategy(self, retention: Retention) -> Strategy:
        """It alone, all else exact."""
        return Strategy(retention, Growing(), Exact(), Device(), Reference())

    @pytest.fixture
    def budget(self, retention: Retention) -> int:
        """Most tokens held between two calls; 32 stand for no limit."""
        if isinstance(retention, Scored):
            return retention.budget + retention.every
        return 32 if retention.newest is None else max(2, retention.first + retention.newest - 1)

    def test_repr_and_str_parse_back(self, retention: Retention) -> None:
        """A result can be rebuilt from its record."""
        assert parse(repr(retention)).retention == retention
        assert parse(str(retention)).retention == retention

    @pytest.mark.parametrize("chunk", [1, 3, 7])
    def test_what_is_seen_and_what_is_held(
        self, retention: Retention, strategy: Strategy, budget: int, chunk: int
    ) -> None:
        """Masks, shapes and counts agree at every step; the call's own tokens are all there, exact.

        What is held consists of tokens that came, in the order they came; positional retention
        holds exactly the first and the newest that it says.
        """
        layer = one_layer(strategy)
        came: list[int] = []
        for step in range(0, 4 * budget, chunk):
            new = list(range(step, step + chunk))
            came += new
            # token i is the number i, in every channel of its values
            values = torch.tensor(new, dtype=torch.float32)[None, None, :, None].expand(2, 3, -1, 4)
            length, offset = layer.get_mask_sizes(chunk)
            k, v = attended(layer, normal(2, 3, chunk, 8, seed=step), values)
            assert k.shape == (2, 3, length, 8)
            assert v.shape == (2, 3, length, 4)
            assert offset + length == len(came) == layer.get_seq_length()
            assert same(dense(v)[:, :, -chunk:].contiguous(), values.contiguous())
            held = layer.values[..., 0]  # [B, H, T]
            assert held.shape[-1] == layer.held() == layer.get_mask_sizes(1)[0] - 1
            assert (held.diff(dim=-1) > 0).all(), "out of order"
            assert len(came) < budget or layer.held() <= max(budget, 0) or retention.newest is None
            if isinstance(retention, Scored):
                assert layer.held() < retention.budget + retention.every
                if len(came) < retention.budget + retention.every:
                    assert layer.held() == len(came)
            elif retention.newest is None:
                assert held[0, 0].tolist() == came
            else:
                first, newest = retention.first, retention.newest - 1
                kept = (
                    came
                    if len(came) <= first + newest
                    else came[:first] + came[len(came) - newest :]
                )
                assert (held == torch.tensor(kept, dtype=torch.float32)).all()

    @pytest.mark.parametrize(
        ("codec", "placement"),
        [
            (Affine(block=8, k_bits=8, v_bits=8), "device"),
            (Affine(block=8, tail=5), "host"),
            (Exact(block=4), "disk"),
        ],
        ids=str,
    )
    def test_goes_with_codecs_and_placements(
        self, retention: Retention, strategy: Strategy, budget: int, codec: Codec, placement: str
    ) -> None:
        """What is chosen is encoded afterwards, once; what is held is in order and within budget.

        Values of a token are all its number, which every codec here stores exactly.
        """
        strategy = strategy.replace(codec=codec, placement=parse(placement).placement)
        layer, known, encoded = one_layer(strategy), [set(), set()], 0
        came = 0
        for step, S in enumerate((3 * budget, *[1] * budget, 7, *[1] * budget)):
            new = torch.arange(came, came + S, dtype=torch.float32)
            values = new[None, None, :, None].expand(1, 2, -1, 4)
            length, _ = layer.get_mask_sizes(S)
            k, v = attended(layer, normal(1, 2, S, 8, seed=step), values)
            assert k.shape[2] == length
            assert same(dense(v)[:, :, -S:].contiguous(), values.contiguous())
            came += S
            held = layer.values[0, :, :, 0]  # [H, T]
            assert (held.diff(dim=-1) > 0).all(), "out of order"
            assert same(held, held.round()), "not a token that came"
            if isinstance(retention, Scored):
                block = strategy.codec.block
                assert retention.budget - block < layer.held() < retention.budget + retention.every
            blocks = layer.encoded()[2] or {}
            for head, before in enumerate(known):
                parts = [raw_bytes(x[0, head]).view(x.shape[2], -1) for x in blocks.values()]
                now = {row.numpy().tobytes() for row in torch.cat(parts, -1)} if parts else set()
                assert len(now - before) <= layer.stats.blocks_encoded - encoded, "encoded again"
                before |= now
            encoded = layer.stats.blocks_encoded

    @pytest.mark.parametrize("placement", REGISTRIES["placement"].builtin)
    @pytest.mark.parametrize("codec", REGISTRIES["codec"].builtin)
    def test_goes_with_every_codec_and_placement(
        self, retention: Retention, strategy: Strategy, codec: str, placement: str
    ) -> None:
        """What is held is in order, within the budget, and as far from exact as the codec says."""
        if not isinstance(retention, Scored):
            pytest.skip(f"{retention}: counts columns; see StrategyConformance")
        others = parse(f"{codec}(block=8)+{placement}")
        strategy = strategy.replace(codec=others.codec, placement=others.placement)
        layer, keys = one_layer(strategy), normal(2, 2, 40, 16, seed=0)
        oracle = ChosenOracle(strategy.retention, torch.zeros(2, dtype=torch.long))
        for i in (0, *range(33, 40)):
            new = keys[:, :, i : 33 if i == 0 else i + 1]
            oracle.look(layer)
            got = attended(layer, new, new)
            oracle.update(new, new)
            for x, (exact, error) in zip(got, oracle.visible()[0], strict=True):
                assert ((dense(x) - exact).abs() <= error * (1 + 1e-5) + 1e-6 * (error > 0)).all()
            oracle.follow(layer)
            assert layer.held() < retention.budget + retention.every

    def test_prompt_is_read_in_full(self, strategy: Strategy, budget: int) -> None:
        """Eviction comes after attention: the first forward of a long prompt is exact."""
        model, ids = tiny_llama(), prompt(3 * budget)
        with torch.no_grad():
            exact = model(ids, **cache_argument(DynamicCache(config=model.config))).logits
            ours = model(ids, **cache_argument(build(strategy, model.config))).logits
        assert_close(ours, exact)

    def test_within_the_budget_nothing_is_lost(
        self, retention: Retention, strategy: Strategy, budget: int
    ) -> None:
        """As long as all fits, tokens are those of `DynamicCache`."""
        model = tiny_llama()
        if isinstance(retention, Scored):  # layers may have unlike ones
            layers = model.config.num_hidden_layers
            budget = min(retention.at(i, layers).budget + retention.every for i in range(layers))
        n = budget // 2
        if n < 2:
            pytest.skip(f"{retention}: a budget of {budget} fits nothing")
        ids = prompt(n, batch=2)
        new = {"max_new_tokens": budget - n, "do_sample": False}
        plain = model.generate(ids, **new)
        ours = model.generate(ids, **cache_argument(build(strategy, model.config)), **new)
        assert torch.equal(ours, plain)

    def test_memory_is_bounded(self, retention: Retention, strategy: Strategy, budget: int) -> None:
        """Bytes after ten budgets are those after five."""
        if not isinstance(retention, Scored) and retention.newest is None:
            pytest.skip(f"{retention}: keeps everything")
        layer, sizes = one_layer(strategy), []
        for step in range(10 * budget):
            attended(layer, normal(1, 2, 1, 8, seed=step), normal(1, 2, 1, 8, seed=step))
            sizes.append(walked_bytes(layer))
        half = len(sizes) // 2
        assert max(sizes[half:]) <= max(sizes[:half])
        # idle room in front and behind is at most what is held, and a few rows
        assert max(sizes) <= (3 * budget + 64) * 2 * 2 * 8 * 4

    def test_left_padded_rows_are_as_alone(self, strategy: Strategy, budget: int) -> None:
        """Rows of unlike length overflow at different times; each is as it would be alone."""
        if isinstance(strategy.retention, Scored):
            pytest.skip(f"{strategy.retention}: equal keys may tie; see the next test")
        model = tiny_llama()
        rows = [prompt(n, seed=n)[0] for n in (budget + 5, 3, budget // 2 + 1, budget + 2)]
        new = {"max_new_tokens": 2 * budget, "do_sample": False}
        together = model.generate(
            **left_padded(rows), cache_implementation=f"{PREFIX}{strategy!r}", **new
        )
        for row, out in zip(rows, together, strict=True):
            alone = model.generate(row[None], cache_implementation=f"{PREFIX}{strategy!r}", **new)
            assert out[-2 * budget :].tolist() == alone[0, -2 * budget :].tolist()

    def test_padding_goes_first(self, strategy: Strategy, budget: int) -> None:
        """A padding token is held only beside all real tokens of its row, whose choice is its own.

        Rows are cut when they have so many tokens, whatever the others have.
        """
        padding = torch.tensor([0, budget, budget // 2])
        together = one_layer(strategy, padding)
        alone = [one_layer(strategy) for _ in padding]
        for i in range(4 * budget):
            keys = normal(3, 2, 1, 8, seed=i)
            values = torch.full((3, 2, 1, 4), float(i))  # token i is the number i
            attended(together, keys, values)
            for row, layer in enumerate(alone):
                if i < padding[row] or (row and strategy.retention.newest is not None):
                    continue  # a window counts columns
                attended(layer, keys[row : row + 1], values[row : row + 1])
                n = layer.held()  # other rows may hold more: then the first are hidden
                assert same(together.values[row, :, -n:].contiguous(), layer.values[0])
            held = together.values[..., 0]  # [B, H, T]
            is_padding = held < padding[:, None, None]
            real = (i + 1 - padding).clamp_min(0)[:, None]
            kept_real = (~is_padding).sum(-1)
            if strategy.retention.newest is None:  # a window counts columns: masks do the rest
                assert ((is_padding.sum(-1) == 0) | (kept_real >= real)).all()

    @pytest.mark.parametrize("recording", [False, True])
    def test_crop(self, strategy: Strategy, budget: int, recording: bool) -> None:
        """While the past is recorded, a rollback leaves no trace; else it is right or `Evicted`."""
        for removed in (1, 2, budget // 2, budget):
            layers = [one_layer(strategy) for _ in range(2)]
            for layer in layers:
                attended(
                    layer, normal(1, 2, 2 * budget, 8, seed=0), normal(1, 2, 2 * budget, 8, seed=1)
                )
            if recording:
                layers[0].activate_past_recording()
            extra = normal(1, 2, removed, 8, seed=2)
            attended(layers[0], extra, extra)
            try:
                layers[0].crop(-removed)
            except Evicted:
                assert not recording
                continue
            one = normal(1, 2, 1, 8, seed=3)
            if isinstance(strategy.retention, Scored) and not recording:
                continue  # it chose anew with the tokens that are gone
            for a, b in zip(*(attended(layer, one, one) for layer in layers), strict=True):
                assert torch.equal(dense(a), dense(b))

    def test_batch_operations_and_reset(self, strategy: Strategy, budget: int) -> None:
        """Rows are independent: reordering them before or after is the same; reset forgets."""
        order = torch.tensor([2, 0, 0, 1])
        keys, values = (normal(3, 2, 3 * budget, 8, seed=s) for s in (0, 1))
        late, early = one_layer(strategy), one_layer(strategy)
        for i in range(0, 3 * budget, 3):
            attended(late, keys[:, :, i : i + 3], values[:, :, i : i + 3])
            attended(early, keys[order][:, :, i : i + 3], values[order][:, :, i : i + 3])
        late.batch_select_indices(order)
        assert same(late.keys.contiguous(), early.keys.contiguous())
        assert same(late.values.contiguous(), early.values.contiguous())
        late.reset()
        assert late.get_seq_length() == late.held() == 0
        fresh = one_layer(strategy)
        for a, b in zip(attended(late, keys, values), attended(fresh, keys, values), strict=True):
            assert torch.equal(dense(a), dense(b))
        assert same(late.values, fresh.values)
