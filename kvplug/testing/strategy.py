"""The contract of a whole strategy: what always holds, in `generate` and layer by layer."""

from __future__ import annotations

import copy
import dataclasses
import json
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from ..attention.view import View
from ..cache import Cache
from ..compat import ATTENTION, cache_argument, output_cache
from ..errors import Unseen, ViewError
from ..factory import build
from ..layers.layout import Growing
from ..placement.device import Device
from ..registry import available
from ..retention.base import Scored
from ..spec import PREFIX, Strategy, parse
from .layers import OnLayers
from .memory import walked_bytes
from .oracle import kept_whole, one_layer
from .reuse import Reuse
from .tools import (
    DTYPES,
    GREEDY,
    assert_close,
    attended,
    left_padded,
    normal,
    prompt,
    tiny_llama,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 3},
    "returned": {"num_beams": 3, "num_return_sequences": 3},
    "sampled sequences": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    # up to 5.23 padding in an answer is a hole in the mask of the assistant
    "assistant": {"assistant_model": True, "suppress_tokens": [0]},
    "chunked prefill": {"prefill_chunk_size": 5},
}
ASSISTED = ("prompt lookup", "assistant")  # of one row alone
HEADS = [(4, 4), (8, 2), (4, 1)]  # of queries, of keys and values
CHUNKS = [1, 3, 8, 11, 64]


class StrategyConformance(OnLayers, Reuse):
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
        self, run: Callable, strategy: Strategy, model: PreTrainedModel, monkeypatch: Any
    ) -> None:
        """What is kept and how it is encoded decide the result; where it lies does not."""
        plain = strategy.replace(layout=Growing(), placement=Device())
        if strategy.layout.is_compileable(strategy) and plain.codec.feedback:
            # a layer of a compiled step rounds keys plainly, and so does any where none are shown
            monkeypatch.setattr(model.config, ATTENTION, "eager")
        if isinstance(plain.retention, Scored) and not plain.is_coded:
            pytest.skip(f"{strategy}: where tokens are placed in blocks, these go as wholes")
        assert torch.equal(run(prompt(37)), run(prompt(37), spec=f"{PREFIX}{plain!r}"))

    def test_left_padded_rows_are_as_alone(
        self, run: Callable, strategy: Strategy, spec: str
    ) -> None:
        """Before and after eviction, with rows that overflow at different times.

        Blocks start with the padding, so where a codec loses something, or they are dropped as
        wholes, only the longest row, which has none, must be the same.
        """
        cut = isinstance(strategy.retention, Scored) and one_layer(strategy).cuts_blocks
        rows = [prompt(n, seed=n)[0] for n in (29, 5, 16)]
        together = run(left_padded(rows), max_new_tokens=20)
        for row, out in zip(
            rows if strategy.lossless and not cut else rows[:1], together, strict=False
        ):
            assert out[-20:].tolist() == run(row[None], max_new_tokens=20)[0, -20:].tolist()

    def test_eager_and_sdpa_agree(
        self, spec: str, strategy: Strategy, lossless: bool, fresh: Callable
    ) -> None:
        """`eager` reads dense copies, and they are counted; `sdpa` never makes one."""
        outputs, inputs = {}, left_padded([prompt(n, seed=n)[0] for n in (30, 11)])
        for name in ("sdpa", "eager"):
            model = tiny_llama(attn_implementation=name)
            caches = []
            retention = strategy.retention
            # it shows no queries, and its mask knows nothing of rows that are cut one by one
            if name == "eager" and isinstance(retention, Scored) and retention.every > 1:
                with pytest.raises((Unseen, ViewError), match=r"attn_implementation='sdpa'"):
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

    # ------------------------------------------------------------------------- storage and memory

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
        assert config.cache_config == before
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
