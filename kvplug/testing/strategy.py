"""The contract of a whole strategy: the invariants, in `generate` and layer by layer."""

from __future__ import annotations

import copy
import dataclasses
import json
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import DynamicCache, GenerationConfig

from ..attention.view import View
from ..cache import Cache
from ..compat import cache_argument, output_cache
from ..errors import Unseen
from ..factory import build
from ..layers.layout import Growing
from ..placement.device import Device
from ..registry import available
from ..retention.base import Scored
from ..spec import PREFIX, Strategy, parse

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

from .memory import peak_bytes, storages_of, walked_bytes
from .oracle import EACH, STEP, Machine, budget, kept_whole, one_layer
from .tools import (
    DRAWN,
    DTYPES,
    assert_close,
    attended,
    left_padded,
    normal,
    prompt,
    same,
    tiny_llama,
)

GREEDY = {"do_sample": False, "max_new_tokens": 14}


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 3},
    "returned": {"num_beams": 3, "num_return_sequences": 3},
    "sampled sequences": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {"assistant_model": True},
    "chunked prefill": {"prefill_chunk_size": 5},
}
ASSISTED = ("prompt lookup", "assistant")  # of one row alone
HEADS = [(4, 4), (8, 2), (4, 1)]  # of queries, of keys and values
CHUNKS = [1, 3, 8, 11, 64]
OPERATIONS: dict[str, tuple[Callable[[Cache], None], list[int]]] = {  # and the rows it leaves
    "reorder": (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "repeat": (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "index": (lambda c: c.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "mask": (lambda c: c.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
}


class StrategyConformance:
    """What always holds of a cache, whatever its stages. Override the fixture `spec`.

    Use small blocks, tails and windows, e.g. `"sinks(sinks=2, window=10)+int4(block=8, tail=8)"`.
    Prompts have up to 40 tokens. Override `model` to test on another architecture.
    """

    @pytest.fixture
    def spec(self) -> str:
        """The strategy under test, as a user writes it."""
        raise NotImplementedError("override the fixture 'spec'")

    @pytest.fixture
    def model(self) -> PreTrainedModel:
        """A model with a vocabulary of 97."""
        return tiny_llama()

    # ------------------------------------------------------------------------------- what it says

    @pytest.fixture
    def strategy(self, spec: str) -> Strategy:
        """The strategy, parsed."""
        return parse(spec)

    @pytest.fixture
    def lossless(self, strategy: Strategy, model: PreTrainedModel) -> bool:
        """Whether 64 tokens must be those of `DynamicCache`."""
        return strategy.lossless and kept_whole(strategy.retention, 64)

    @pytest.fixture
    def run(self, model: PreTrainedModel, spec: str) -> Callable[..., Tensor]:
        """`generate` with the strategy, seeded; `spec=None` for transformers' own default."""

        def generate(ids: Tensor | dict, spec: str | None = PREFIX + spec, **kwargs: Any) -> Any:
            torch.manual_seed(0)
            inputs = ids if isinstance(ids, dict) else {"input_ids": ids}
            return model.generate(**inputs, cache_implementation=spec, **(GREEDY | kwargs))

        return generate

    @pytest.fixture
    def fresh(self, model: PreTrainedModel, spec: str) -> Callable[[], Cache]:
        """A new cache with room for 128 tokens."""
        return lambda: build(spec, model.config, max_cache_len=128)

    def test_parses_back(self, strategy: Strategy) -> None:
        """`repr` and `str` are specs of an equal strategy."""
        assert parse(repr(strategy)) == strategy
        assert parse(PREFIX + str(strategy)) == strategy

    # -------------------------------------------------------------------------------- generation

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("batch", [1, 2])
    def test_generation(
        self, run: Callable, model: PreTrainedModel, lossless: bool, mode: str, batch: int
    ) -> None:
        """Every way to generate runs twice alike; where nothing is lost, as with `DynamicCache`."""
        kwargs = dict(MODES[mode])
        if batch > 1 and mode in ASSISTED:
            pytest.skip("assisted decoding takes one row")
        if "assistant_model" in kwargs:
            kwargs["assistant_model"] = model if not lossless else tiny_llama(num_hidden_layers=1)
        ids = prompt(23, batch)
        if "prompt_lookup_num_tokens" in kwargs:
            ids = ids[:, :8].repeat(1, 4)  # something to look up
        out = run(ids, **kwargs)
        assert out.shape == (batch * kwargs.get("num_return_sequences", 1), ids.shape[1] + 14)
        assert torch.equal(out, run(ids, **kwargs))
        if lossless:
            assert torch.equal(out, run(ids, spec=None, **kwargs))

    def test_scores_are_finite(self, run: Callable) -> None:
        """No NaN in any step."""
        out = run(prompt(23, 2), output_scores=True, return_dict_in_generate=True)
        assert all(s.isfinite().all() for s in out.scores)
        assert isinstance(output_cache(out), Cache)

    def test_layout_and_placement_change_no_token(
        self, run: Callable, strategy: Strategy, model: PreTrainedModel
    ) -> None:
        """What is kept and how it is encoded decide the result; where it lies does not."""
        plain = strategy.replace(layout=Growing(), placement=Device())
        assert torch.equal(run(prompt(37)), run(prompt(37), spec=f"{PREFIX}{plain!r}"))

    def test_left_padded_rows_are_as_alone(
        self, run: Callable, strategy: Strategy, spec: str
    ) -> None:
        """Before and after eviction, with rows that overflow at different times.

        Blocks of a lossy codec start with the padding, so there only the longest row, which has
        none, must be the same.
        """
        rows = [prompt(n, seed=n)[0] for n in (29, 5, 16)]
        together = run(left_padded(rows), max_new_tokens=20)
        for row, out in zip(rows if strategy.lossless else rows[:1], together, strict=False):
            assert out[-20:].tolist() == run(row[None], max_new_tokens=20)[0, -20:].tolist()

    def test_eager_and_sdpa_agree(
        self, spec: str, strategy: Strategy, lossless: bool, fresh: Callable
    ) -> None:
        """`eager` reads dense copies, and they are counted; `sdpa` never makes one."""
        outputs, inputs = {}, left_padded([prompt(n, seed=n)[0] for n in (30, 11)])
        for name in ("sdpa", "eager"):
            model = tiny_llama(attn_implementation=name)
            caches = []
            if name == "eager" and strategy.retention.queries:  # it shows none
                with pytest.raises(Unseen, match=r"attn_implementation='sdpa'"):
                    model.generate(**inputs, **cache_argument(fresh()), **GREEDY)
                return
            for kwargs in ({}, {"num_beams": 2}, {"do_sample": True}, {"prefill_chunk_size": 7}):
                cache = fresh()
                torch.manual_seed(0)
                cache.set_padding(inputs["attention_mask"])
                out = model.generate(**inputs, **cache_argument(cache), **(GREEDY | kwargs))
                outputs.setdefault(name, []).append(out)
                caches.append(cache)
            one = one_layer(strategy)
            attended(one, *(normal(1, 2, 40, 8, seed=s) for s in (0, 1)))
            got, _ = attended(one, *(normal(1, 2, 1, 8, seed=s) for s in (2, 3)))
            views = isinstance(got, View) and not got.stored.is_plain
            for cache in caches:
                materialised = cache.stats()["materialised"]
                assert bool(materialised) == (views and name == "eager"), materialised
                assert bool(cache.stats()["kernels"]) == (views and name == "sdpa")
        if strategy.lossless:  # else a rounding may tip a code over, and soon a token
            for a, b in zip(outputs["sdpa"], outputs["eager"], strict=True):
                assert torch.equal(a, b)
        with torch.no_grad():  # one content, read both ways
            cache, token = fresh(), prompt(1, 2, seed=5)
            cache.set_padding(inputs["attention_mask"])
            model(**inputs, **cache_argument(cache))
            mask = torch.cat((inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)), 1)
            a, b = (
                tiny_llama(attn_implementation=name)(
                    token, attention_mask=mask, **cache_argument(copy.deepcopy(cache))
                ).logits
                for name in ("sdpa", "eager")
            )
            assert_close(b, a)

    @pytest.mark.parametrize("heads", HEADS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_heads_and_dtypes(
        self, spec: str, lossless: bool, heads: tuple[int, int], dtype: torch.dtype
    ) -> None:
        """Multi-head, grouped and multi-query attention in each float type."""
        full = tiny_llama(num_attention_heads=heads[0], num_key_value_heads=heads[1])
        model = copy.deepcopy(full).to(dtype)
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        caches.append(build(spec, model.config, max_cache_len=64))
        errors = []
        with torch.no_grad():
            for ids in (prompt(33, 2), *prompt(6, 2, seed=1).split(1, 1)):
                best, plain, ours = (
                    m(ids, **cache_argument(c)).logits.float()
                    for m, c in zip((full, model, model), caches, strict=True)
                )
                assert ours.isfinite().all()
                errors.append([float((x - best).abs().mean()) for x in (plain, ours)])
        # as near to float32 as `DynamicCache` is, in the mean over all logits
        for theirs, own in errors if lossless else errors[:1]:
            assert own <= 1.5 * theirs + 1e-5

    # ------------------------------------------------------------------- lengths, chunks, exactness

    @pytest.mark.parametrize("chunk", CHUNKS)
    def test_lengths_and_chunks(
        self, strategy: Strategy, model: PreTrainedModel, fresh: Callable, chunk: int
    ) -> None:
        """Prompts around every block border, fed in odd chunks: counts, masks and shapes agree.

        The first forward is exact whatever the codec; all of them where nothing is lost.
        """
        block = strategy.codec.block if strategy.codec.block <= 16 else 8
        for length in (1, block - 1, block, block + 1, 3 * block + 7):
            if not length:
                continue
            ids = prompt(length, 2, seed=length)
            exact, ours = DynamicCache(config=model.config), fresh()
            lossless = strategy.lossless and kept_whole(strategy.retention, length)
            with torch.no_grad():
                for i in range(0, length, chunk):
                    part = ids[:, i : i + chunk]
                    a, b = (model(part, **cache_argument(c)).logits for c in (exact, ours))
                    assert b.isfinite().all()
                    if i == 0 or lossless:
                        assert_close(b, a)
            assert int(ours.get_seq_length()) == length
            assert ours.held() <= length

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

    # ------------------------------------------------------------------------- storage and memory

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

    def test_full_precision_stays_within_the_tail(
        self, strategy: Strategy, fresh: Callable, model: PreTrainedModel
    ) -> None:
        """After a generation, at most `tail + block - 1` tokens are not encoded."""
        if strategy.lossless:
            pytest.skip(f"{strategy}: nothing is encoded with loss")
        cache = fresh()
        model.generate(prompt(40), **cache_argument(cache), **(GREEDY | {"max_new_tokens": 30}))
        for layer in cache.layers:
            codec, (begin, end, _) = layer.strategy.codec, layer.encoded()
            if not codec.lossless:
                assert 69 - max(begin, end) <= codec.tail + codec.block - 1

    def test_bytes_are_honest(self, fresh: Callable, model: PreTrainedModel) -> None:
        """`nbytes()` is what the garbage collector finds, at every moment."""
        cache = fresh()
        assert cache.nbytes() == walked_bytes(cache)
        for n in (33, 1, 1, 9, 1):
            with torch.no_grad():
                model(prompt(n, 2), **cache_argument(cache))
            assert cache.nbytes() == walked_bytes(cache) > 0
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.crop(0)
        assert cache.nbytes() == walked_bytes(cache)
        cache.reset()
        assert cache.nbytes() == walked_bytes(cache)

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

    # ------------------------------------------------------------------------------ the whole API

    def test_reset_and_use_again(self, fresh: Callable, model: PreTrainedModel) -> None:
        """After `reset` a cache is as new, for shorter and for longer sequences."""
        used = fresh()
        model.generate(prompt(40, 2), **cache_argument(used), **GREEDY)
        for n in (9, 50):
            used.reset()
            assert int(used.get_seq_length()) == used.held() == 0
            outs = [
                model.generate(prompt(n, 2, seed=n), **cache_argument(c), **GREEDY)
                for c in (used, fresh())
            ]
            assert torch.equal(*outs)

    def test_second_generate_with_the_returned_cache(
        self, run: Callable, model: PreTrainedModel, fresh: Callable, lossless: bool
    ) -> None:
        """Two turns; a cache made by `build` and one made by `generate` are the same.

        A layout that reserves has made room for the first call, and makes more for the second.
        """
        new = {"max_new_tokens": 8}

        def first(**kwargs: Any) -> Any:
            return run(prompt(17), return_dict_in_generate=True, **new, **kwargs)

        def second(said: Tensor, cache: Any) -> Tensor:
            """All that was said, and a new question."""
            ids = torch.cat((said, prompt(9, seed=4)), 1)
            return model.generate(ids, **cache_argument(cache), **(GREEDY | new))

        made, built = first(), fresh()
        said = model.generate(prompt(17), **cache_argument(built), **(GREEDY | new))
        assert torch.equal(said, made.sequences)
        turn = second(said, built)
        assert torch.equal(second(said, output_cache(made)), turn)
        if lossless:
            plain = first(spec=None)
            assert torch.equal(second(plain.sequences, output_cache(plain)), turn)

    def test_deepcopy_and_diverge(self, fresh: Callable, model: PreTrainedModel) -> None:
        """Prefixes are reused by copying: what is done to one copy does not reach another."""
        prefix = prompt(26)
        cache = fresh()
        with torch.no_grad():
            model(prefix, **cache_argument(cache))
        ends = [torch.cat((prefix, prompt(7, seed=s)), 1) for s in (1, 2, 3)]
        apart = []
        for ids in ends:
            own = fresh()
            with torch.no_grad():
                model(prefix, **cache_argument(own))
            apart.append(model.generate(ids, **cache_argument(own), **GREEDY))
        for ids, expected in zip(ends, apart, strict=True):
            twin = copy.deepcopy(cache)  # looked at before it has made room of its own
            assert storages_of(twin).isdisjoint(storages_of(cache)), "the copy shares storage"
            assert torch.equal(model.generate(ids, **cache_argument(twin), **GREEDY), expected)
        assert twin.stats()["blocks_encoded"] >= cache.stats()["blocks_encoded"]
        assert storages_of(twin).isdisjoint(storages_of(cache)), "the copy shares storage"

    @pytest.mark.parametrize("operation", OPERATIONS)
    def test_batch_operations(
        self, strategy: Strategy, model: PreTrainedModel, fresh: Callable, operation: str
    ) -> None:
        """Rows are independent: choosing them after or before the prefill is the same."""
        ids, late = prompt(30, 3), fresh()
        change, rows = OPERATIONS[operation]
        early = fresh()
        with torch.no_grad():
            for i in (0, 15):
                model(ids[:, i : i + 15], **cache_argument(late))
                model(ids[rows][:, i : i + 15], **cache_argument(early))
            change(late)
            for step in range(12):
                token = prompt(1, len(rows), seed=step)
                a, b = (model(token, **cache_argument(c)).logits for c in (early, late))
                assert_close(b, a)

    def test_crop_and_go_on(
        self, strategy: Strategy, model: PreTrainedModel, fresh: Callable, lossless: bool
    ) -> None:
        """While the past is recorded a rollback leaves no trace, if `is_croppable`."""
        ids = prompt(30)
        plain, cropped = fresh(), fresh()
        with torch.no_grad():
            for cache in (plain, cropped):
                model(ids, **cache_argument(cache))
            cropped.activate_past_recording()
            for step, (guesses, removed) in enumerate([(5, 5), (4, 2), (9, 8), (1, 0), (6, 6)]):
                tokens = prompt(guesses, seed=step)
                model(tokens, **cache_argument(cropped))
                cropped.crop(-removed)
                assert (
                    int(cropped.get_seq_length()) == int(plain.get_seq_length()) + guesses - removed
                )
                if guesses > removed:
                    model(tokens[:, : guesses - removed], **cache_argument(plain))
                assert cropped.held() == plain.held()
            token = prompt(1, seed=9)
            a, b = (model(token, **cache_argument(c)).logits for c in (plain, cropped))
        assert b.isfinite().all()
        # the tokens of one call see each other in full precision, so calls that were cut otherwise
        # may have computed later layers a little differently where the codec loses something
        if strategy.lossless and kept_whole(strategy.retention, 40):
            assert_close(b, a)
        keys = [c.layers[0].keys for c in (plain, cropped)]
        if (
            plain.is_croppable
            and strategy.retention.newest is None
            and not isinstance(strategy.retention, Scored)
        ):
            assert torch.equal(keys[0][:, :, :30], keys[1][:, :, :30])
        with pytest.raises(ValueError, match=r"positive|minus"):
            cropped.crop(5)

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

    # ----------------------------------------------------------------- callers, configs and threads

    def test_nothing_of_the_caller_is_changed(
        self, model: PreTrainedModel, spec: str, strategy: Strategy
    ) -> None:
        """Neither `cache_config` nor the generation config: the same call again gives the same."""
        name = strategy.codec.name
        arguments = {"block": strategy.codec.block}
        before = dict(arguments)
        rest = ", ".join(
            f"{f.name}={getattr(strategy.codec, f.name)!r}"
            for f in dataclasses.fields(strategy.codec)
            if f.name != "block"
        )
        config = GenerationConfig(
            cache_implementation=PREFIX
            + repr(strategy).replace(repr(strategy.codec), f"{name}({rest})", 1),
            cache_config=arguments,
            **GREEDY,
        )
        as_dict = config.to_dict()
        outs = [model.generate(prompt(33), generation_config=config) for _ in range(2)]
        assert torch.equal(*outs)
        assert arguments == before
        assert config.to_dict() == as_dict
        assert config.cache_config is arguments or config.cache_config == before
        spelled = model.generate(prompt(33), cache_implementation=PREFIX + spec, **GREEDY)
        assert torch.equal(outs[0], spelled)

    def test_two_threads_do_not_meet(self, model: PreTrainedModel, spec: str) -> None:
        """Two threads with two strategies get what each gets alone."""
        specs = [PREFIX + spec, "int4(block=8, tail=0)"]
        ids = prompt(31)
        alone = [model.generate(ids, cache_implementation=s, **GREEDY) for s in specs]
        together: dict[int, list[Tensor]] = {0: [], 1: []}

        def work(i: int) -> None:
            for _ in range(2):
                together[i].append(model.generate(ids, cache_implementation=specs[i], **GREEDY))

        threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        for i in (0, 1):
            assert len(together[i]) == 2, "a thread failed"
            assert all(torch.equal(out, alone[i]) for out in together[i])

    def test_stats_are_a_record(self, fresh: Callable, model: PreTrainedModel) -> None:
        """Plain types, and the strategy in them parses back."""
        cache = fresh()
        model.generate(prompt(33), **cache_argument(cache), **GREEDY)
        stats = json.loads(json.dumps(cache.stats()))
        assert parse(stats["strategy"]) == cache.strategy
        assert set(stats["kernels"]) <= set(available()["kernel"])
        assert all(type(n) is int and n > 0 for n in stats["kernels"].values())
