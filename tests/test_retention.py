"""Every built-in retention keeps the contract."""

import copy
import dataclasses
import itertools
from typing import ClassVar

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import FalconConfig, T5Config

import kvplug
from kvplug.compat import cache_argument
from kvplug.registry import REGISTRIES
from kvplug.retention.base import _highest
from kvplug.testing import RetentionConformance, tiny_llama
from kvplug.testing.oracle import one_layer
from kvplug.testing.specs import SMALL
from kvplug.testing.tools import assert_close, attended, dense, left_padded, normal, prompt, seeded


class TestRetention(RetentionConformance):
    @pytest.fixture(
        params=[
            *SMALL.values(),
            "window(length=1)",
            "window(length=2)",
            "sinks(sinks=1, window=1)",
            "sinks(sinks=5, window=3)",
        ]
    )
    def retention(self, request):
        return kvplug.parse(request.param).retention


@dataclasses.dataclass(frozen=True)
class LongKeys(kvplug.Scored):
    """Keep the tokens whose keys are longest."""

    name: ClassVar[str] = "longkeys"
    budget: int = kvplug.option(12, "tokens kept", ge=1)
    every: int = kvplug.option(5, "more tokens between two choices", ge=1)

    def score(self, tokens):
        return tokens.keys.norm(dim=-1)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(REGISTRIES["retention"]._targets, "longkeys", LongKeys)


@pytest.mark.usefixtures("registered")
class TestScored(RetentionConformance):
    @pytest.fixture(params=[LongKeys(), LongKeys(budget=3, every=1), LongKeys(budget=4, every=20)])
    def retention(self, request):
        return request.param


@pytest.mark.usefixtures("registered")
def test_scored_keeps_the_highest_per_head():
    layer = one_layer(kvplug.parse("longkeys(budget=3, every=2)"))
    length = torch.tensor([[5.0, 1, 4, 2, 3], [1, 2, 3, 4, 5]])  # [H, T]
    keys = length[None, :, :, None].expand(1, 2, 5, 4).contiguous()
    values = torch.arange(5.0)[None, None, :, None].expand(1, 2, 5, 4).contiguous()
    layer.update(keys, values)
    assert layer.values[0, :, :, 0].tolist() == [[0, 2, 4], [2, 3, 4]]


@pytest.mark.usefixtures("registered")
def test_scored_drops_padding_first():
    layer = one_layer(kvplug.parse("longkeys(budget=4, every=4)"), torch.tensor([0, 5]))
    keys = torch.arange(8.0, 0, -1)[None, None, :, None].expand(2, 1, 8, 4).contiguous()
    values = torch.arange(8.0)[None, None, :, None].expand(2, 1, 8, 4).contiguous()
    layer.update(keys, values)  # keys get shorter: without padding the first 4 stay
    assert layer.values[:, 0, :, 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.usefixtures("registered")
def test_scored_says_what_it_does_not_go_with():
    with pytest.raises(kvplug.SpecError, match=r"'longkeys' picks tokens .* needs room that grows"):
        kvplug.parse("longkeys+static(max_cache_len=64)")


@pytest.mark.usefixtures("registered")
def test_scored_is_refused_where_a_model_counts_columns_itself():
    with pytest.raises(kvplug.SpecError, match="position bias of T5Config"):
        kvplug.build("longkeys", T5Config())
    with pytest.raises(kvplug.SpecError, match="alibi bias of FalconConfig"):
        kvplug.build("longkeys", FalconConfig(alibi=True))


@pytest.mark.usefixtures("registered")
def test_a_mask_with_holes_is_refused_where_tokens_are_chosen():
    """transformers' mask counts columns, and a hole would move to another token."""
    model, mask = tiny_llama(), torch.ones(1, 9, dtype=torch.long)
    mask[0, 4] = 0
    with pytest.raises(kvplug.SpecError, match=r"longkeys.*holes.*left padding"):
        model.generate(
            prompt(9), attention_mask=mask, cache_implementation="longkeys", max_new_tokens=2
        )


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("additive", [False, True])
def test_padding_in_blocks_stays_hidden(additive):
    """Blocks go as wholes, so that what is left of a row's padding is no prefix of the mask's."""
    layer = one_layer(kvplug.parse("longkeys(budget=20, every=3)+int8(block=8)"), PADDING)
    hidden = 0
    for step, S in enumerate((18, *[1] * 30, 5, *[1] * 9)):
        B, H = 3, 2
        seen = layer.get_seq_length()
        values = torch.arange(seen, seen + S, dtype=torch.float32)[None, None, :, None]
        values = values.expand(B, H, S, 4)
        length, offset = layer.get_mask_sizes(S)
        k, v = layer.update(normal(B, H, S, 8, seed=step), values)
        columns, rows = torch.arange(offset, offset + length), torch.arange(seen, seen + S)
        mask = (columns <= rows[:, None]) & (columns >= PADDING[:, None, None])  # transformers'
        mask = mask[:, None]
        if additive:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        query = normal(B, 2 * H, S, 8, seed=-step)
        got = sdpa(query, k, v, attn_mask=mask, enable_gqa=True)
        held = dense(v)[..., 0]  # [B, H, T]: numbers of the tokens
        real = (held >= PADDING[:, None, None])[:, :, None] & (held[:, :, None] <= rows[:, None])
        if layer.encoded()[2] is not None:
            hidden += int((held < PADDING[:, None, None]).sum())
        sides = (dense(x).repeat_interleave(2, 1) for x in (k, v))
        wanted = sdpa(query, *sides, attn_mask=real.repeat_interleave(2, 1))
        sees = real.any(-1).repeat_interleave(2, 1)  # rows of padding see nothing
        assert_close(got[sees], wanted[sees])
    assert hidden
    k, _ = layer.update(normal(3, 2, 1, 8, seed=0), normal(3, 2, 1, 4, seed=0))
    with pytest.raises(kvplug.ViewError, match=r"add.*use attn_implementation='sdpa'"):
        k + 1


PADDING = torch.tensor([0, 7, 13])


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("asked", [0, 1])
def test_layers_of_unlike_length_share_a_mask(asked, monkeypatch):
    """transformers asks one layer for its sizes; the other cuts the mask, or adds to it."""
    model = tiny_llama()
    rows = [prompt(n, seed=n)[0] for n in (30, 11)]
    new = {"max_new_tokens": 40, "do_sample": False}

    def generate(inputs):
        caches = [kvplug.build(f"longkeys(budget={n}, every=1)", model.config) for n in (8, 24)]
        cache = caches[0]
        cache.layers[1] = caches[1].layers[1]
        sizes = cache.layers[asked].get_mask_sizes
        monkeypatch.setattr(cache, "get_mask_sizes", lambda n, layer_idx: sizes(n))
        out = model.generate(**inputs, **cache_argument(cache), **new)
        assert [cache.held(i) for i in (0, 1)] == [8, 24]
        return out[:, -40:].tolist()

    alone = [generate({"input_ids": row[None]})[0] for row in rows]
    assert generate(left_padded(rows)) == alone
    small = model.generate(rows[0][None], cache_implementation="longkeys(budget=8, every=1)", **new)
    assert small[0, -40:].tolist() != alone[0]  # the second layer's budget matters


@pytest.mark.parametrize(
    "spec", ["window(length=9)", "window(length=9)+host", "window(length=12)+static"]
)
def test_window_is_that_of_a_model_trained_with_one(spec):
    """`window(length=w)` on Llama attends to what Mistral with `sliding_window=w` does."""
    from transformers import MistralConfig, MistralForCausalLM

    length = kvplug.parse(spec).retention.length
    llama = tiny_llama()
    config = {
        k: v
        for k, v in llama.config.to_dict().items()
        if k not in ("model_type", "architectures", "sliding_window", "transformers_version")
    }
    mistral = MistralForCausalLM(MistralConfig(**config, sliding_window=length)).eval()
    mistral.load_state_dict(llama.state_dict())
    ids = prompt(5)  # within the window: a longer prompt is read in full by ours
    new = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    theirs = mistral.generate(ids, pad_token_id=0, **new)
    assert torch.equal(llama.generate(ids, cache_implementation=spec, **new), theirs)
    assert not torch.equal(llama.generate(ids, **new), theirs)  # the window matters here


@pytest.mark.parametrize(
    "spec", ["sinks(sinks=3, window=8)", "sinks(sinks=3, window=8)+int8(block=8)"]
)
def test_sinks_stand_right_before_the_window(spec):
    """A step equals a forward without cache over the kept tokens at positions 0, 1, 2, ...

    Only the first layer's keys are a function of the token alone, so a model of one layer.
    """
    model, ids = tiny_llama(num_hidden_layers=1), prompt(40)
    cache = kvplug.build(spec, model.config)
    exact = kvplug.parse(spec).codec.lossless
    with torch.no_grad():
        for i in range(40):
            ours = model(ids[:, i : i + 1], **cache_argument(cache)).logits[:, -1]
            kept = ids[:, : i + 1] if i < 11 else torch.cat((ids[:, :3], ids[:, i - 7 : i + 1]), 1)
            expected = model(kept, use_cache=False).logits[:, -1]
            worst = float((ours - expected).abs().max() / expected.abs().max())
            assert worst < (1e-4 if exact else 0.05)


def test_sinks_of_a_padded_row_are_its_own_first_tokens():
    layer = one_layer(kvplug.parse("sinks(sinks=2, window=4)"), torch.tensor([0, 3]))
    values = torch.arange(12.0)[None, None, :, None].expand(2, 1, 12, 2).contiguous()
    for i in range(12):
        layer.update(normal(2, 1, 1, 4, seed=i), values[:, :, i : i + 1])
        if i == 6:  # row 0 has overflowed, row 1 (3 padding, 4 real tokens) has not
            assert layer.values[:, 0, :, 0].tolist() == [[0, 1, 4, 5, 6], [2, 3, 4, 5, 6]]
    assert layer.values[:, 0, :, 0].tolist() == [[0, 1, 9, 10, 11], [3, 4, 9, 10, 11]]


def test_evicted_says_what_to_do():
    layer = one_layer(kvplug.parse("window(length=4)"))
    layer.update(normal(1, 1, 20, 4, seed=0), normal(1, 1, 20, 4, seed=1))
    before = layer.keys
    with pytest.raises(
        kvplug.Evicted, match=r"cannot crop 9 of 20 tokens.*activate_past_recording"
    ):
        layer.crop(-9)
    assert layer.get_seq_length() == 20
    assert torch.equal(layer.keys, before)


@pytest.mark.parametrize("n", [1, 5, 30])
@pytest.mark.parametrize("padding", [(0, 0), (0, 17), (3, 40)], ids=str)
def test_queries_give_to_what_is_held_and_had_come(n, padding):
    """After tokens have gone, beside padding and beside what only fills up a row."""
    B, H, G, T, D = 2, 2, 3, 20, 8
    positions = torch.stack(
        [torch.randperm(41, generator=seeded(i))[: T - 1].sort().values for i in range(B * H)]
    )
    positions = torch.cat((positions, torch.full((B * H, 1), 41)), 1).view(B, H, T)
    positions[1, 1, :4] = -1
    tokens = kvplug.Candidates(
        normal(B, H, T, D, seed=0), normal(B, H, T, D, seed=1), positions, torch.tensor(padding),
        normal(B, G * H, n, D, seed=2), scale=0.5,
    )  # fmt: skip
    got = tokens.attention()
    for b, h, g, q in itertools.product(*map(range, (B, H, G, n))):
        came = 41 - (n - 1 - q)
        at = positions[b, h]
        sees = (at <= came) & (at >= padding[b])
        weights = torch.zeros(T)
        scores = tokens.keys[b, h] @ tokens.queries[b, G * h + g, q] / 2
        weights[sees] = scores[sees].softmax(-1)
        assert_close(got[b, h, g, q], weights)


@pytest.mark.parametrize("n", [0, 7, 12])
def test_the_highest_are_chosen_and_of_equals_the_newer(n):
    score = torch.randint(0, 4, (1, 3, 12), generator=seeded(0)).float()
    score[0, 1, :4] = -torch.inf
    score[0, 2, 9:] = torch.inf
    for scores, chosen in zip(score[0], _highest(score, n)[0], strict=True):
        best = sorted(range(12), key=lambda i: (scores[i], i))[12 - n :]
        assert chosen.tolist() == sorted(best)


def test_blocks_of_tokens_that_stay_go_last():
    """As long as the tail can spare as many tokens as are too many."""
    layer = one_layer(
        kvplug.parse(
            "expected(budget=35, every=8, queries=8, sinks=2, recent=12)+int8(block=16, tail=8)"
        )
    )
    for i in range(12):
        attended(layer, normal(1, 2, 16, 16, seed=i), normal(1, 2, 16, 16, seed=-1 - i))
        assert (layer.positions.read()["p"][..., :2] == torch.arange(2)).all()
    assert layer.evictions > 5


@dataclasses.dataclass(frozen=True)
class Witness(kvplug.Scored):
    """Keep the newest tokens, and write down what was shown."""

    name: ClassVar[str] = "witness"
    log_sum_exp: ClassVar[bool] = True
    shown: ClassVar[list] = []
    budget: int = kvplug.option(12, "tokens kept", ge=1)
    every: int = kvplug.option(5, "more tokens between two choices", ge=1)
    queries: int = kvplug.option(3, "newest queries", ge=1)

    def score(self, tokens):
        self.shown.append(copy.deepcopy(tokens))  # it is read where it lies
        return tokens.positions.float()


@pytest.fixture
def witness(monkeypatch):
    monkeypatch.setitem(REGISTRIES["retention"]._targets, "witness", Witness)
    Witness.shown.clear()
    return Witness.shown


@pytest.mark.parametrize("rest", ["exact", "int8(block=8)", "int8(block=8)+reference"])
@pytest.mark.parametrize("chunk", [None, 11])
def test_queries_and_their_log_sum_exp_are_those_of_attention(witness, rest, chunk):
    """From torch's attention in the prefill, from kernels, and packed by head groups (S = 1)."""
    model = tiny_llama()  # 4 query heads, 2 stored
    rows = [prompt(n, seed=n)[0] for n in (30, 19)]
    model.generate(
        **left_padded(rows), cache_implementation=f"witness+{rest}", max_new_tokens=25,
        do_sample=False, prefill_chunk_size=chunk,
    )  # fmt: skip
    assert len(witness) >= 2 * 4  # layers, and choices of each
    for tokens in witness:
        B, H, T, D = tokens.keys.shape
        assert tokens.queries.shape == (B, 2 * H, 3, D)
        assert tokens.log_sum_exp.shape == (B, 2 * H, 3)
        assert tokens.scale == D**-0.5
        newest = tokens.positions.amax()
        assert (tokens.positions.diff(dim=-1) > 0).all()
        real = tokens.positions >= tokens.padding[:, None, None]
        keys = tokens.keys.repeat_interleave(2, 1)
        scores = torch.einsum("bhd,bhtd->bht", tokens.queries[:, :, -1], keys) * tokens.scale
        scores = scores.masked_fill(~real.repeat_interleave(2, 1), -torch.inf)
        assert_close(tokens.log_sum_exp[..., -1], scores.logsumexp(-1))
        if newest + 1 == T:  # nothing is gone: the older two saw all but the newest
            for back in (1, 2):
                query = tokens.queries[:, :, -1 - back]
                scores = torch.einsum("bhd,bhtd->bht", query, keys) * tokens.scale
                seen = real & (tokens.positions <= newest - back)
                scores = scores.masked_fill(~seen.repeat_interleave(2, 1), -torch.inf)
                if rest == "exact":  # else it saw tokens that were not coded yet
                    assert_close(tokens.log_sum_exp[..., -1 - back], scores.logsumexp(-1))


def test_who_asks_for_queries_passes_gradients(witness):
    """Views from the first prefill on: torch's own attention has the gradient."""
    ids, grads = prompt(14), []
    for cache in (None, "witness"):
        model = tiny_llama().train()
        kwargs = cache_argument(kvplug.build(cache, model.config)) if cache else {}
        model(ids, labels=ids, **kwargs).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert_close(b, a)
    assert all(g.any() for g in grads[1][:4])


def test_a_rollback_forgets_queries_too(witness):
    """While the past is recorded nothing is chosen; then by the queries of the tokens that stay."""
    model = tiny_llama()
    for wrong in ([], [7, 8, 9]):
        cache = kvplug.build("witness(budget=6, every=28)", model.config)
        with torch.no_grad():
            model(prompt(30), **cache_argument(cache))
            cache.activate_past_recording()
            for tokens in ([3, 4, 5], wrong):
                if tokens:
                    model(torch.tensor([tokens]), **cache_argument(cache))
            cache.crop(-len(wrong))
            assert cache.held() == 33
            cache.deactivate_past_recording()
            model(torch.tensor([[6]]), **cache_argument(cache))  # one of three that are wanted
    first, second = witness[:2], witness[2:]
    assert len(second) == 2
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.positions, b.positions)
        assert_close(b.queries, a.queries)
        assert_close(b.log_sum_exp, a.log_sum_exp)
