"""Retention for the question at the end of the prompt: when it chooses, and for whom."""

import copy
import logging

import pytest
import torch

import kvplug
from kvplug.compat import cache_argument, output_cache
from kvplug.testing.oracle import one_layer
from kvplug.testing.tools import GREEDY, attended, left_padded, normal, prompt, tiny_llama

SPEC = "snapkv(budget=16, every=5, window=4)"


@pytest.mark.parametrize("spec", [SPEC, f"{SPEC}+int4(block=8)", "tova(budget=12, every=5)"])
def test_chunks_of_a_prompt_change_nothing(spec):
    """Nothing goes before the question has come, however the prompt comes."""
    model = tiny_llama()
    for lengths in ((39, 22), (39,)):
        ids = left_padded([prompt(n, seed=n)[0] for n in lengths])
        outs = [
            model.generate(**ids, cache_implementation=spec, prefill_chunk_size=chunk, **GREEDY)
            for chunk in (None, 7, 20)
        ]
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])


def test_in_a_loop_of_ones_own_the_prompt_is_told():
    cache, model = kvplug.build(SPEC, tiny_llama().config), tiny_llama()
    cache.expect(36)
    held = []
    with torch.no_grad():
        for part in prompt(36).split(12, dim=1):
            model(part, **cache_argument(cache))
            held.append(cache.held())
    assert held == [12, 24, 16]


def test_another_question_is_told_and_counted(caplog):
    model, ids = tiny_llama(), prompt(30)
    new = {"return_dict_in_generate": True, **GREEDY}
    out = model.generate(ids, cache_implementation=SPEC, **new)
    cache = output_cache(out)
    assert cache.stats()["other_questions"] == 0
    more = torch.cat((out.sequences, prompt(6, seed=1)), 1)
    twin = copy.deepcopy(cache)
    with caplog.at_level(logging.WARNING, logger="kvplug"):
        model.generate(more, **cache_argument(twin), **GREEDY)
    assert twin.stats()["other_questions"] == 1
    assert "snapkv" in caplog.text
    assert "what that asks for may be gone" in caplog.text
    keydiff = output_cache(model.generate(ids, cache_implementation="keydiff(budget=40)", **new))
    caplog.clear()
    model.generate(more, **cache_argument(keydiff), **GREEDY)
    assert not caplog.text


def test_what_has_votes_stays_with_its_neighbours_and_the_window():
    retention = kvplug.parse("snapkv(budget=9, every=1, window=3, pool=3)").retention
    keys = normal(1, 1, 30, 8, seed=0) * 0.01
    keys[:, :, 11] = 5.0
    keys[:, :, 28] = 9.0  # in the window: counts for nobody
    positions = torch.arange(30).expand(1, 1, 30)
    tokens = kvplug.Candidates(
        keys, keys, positions, torch.tensor([0]), queries=torch.ones(1, 2, 3, 8), scale=1.0
    )
    kept = retention.keep(tokens).tokens[0, 0].tolist()
    assert {10, 11, 12, 27, 28, 29} <= set(kept)
    assert len(kept) == 9
    assert 26 not in kept


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("snapkv(pool=4)", r"snapkv\(pool=4\): pool must be odd"),
        ("snapkv(budget=32)", r"budget=32 leaves nothing to choose.*newest 32 tokens always stay"),
        ("lagkv(budget=60)", r"budget=60 leaves nothing.*the first 4 and the newest 64"),
    ],
)
def test_budgets_that_cannot_be_are_refused(spec, text):
    with pytest.raises(kvplug.SpecError, match=text):
        kvplug.parse(spec)


def test_eager_attention_is_refused_before_the_model_runs():
    model = tiny_llama(attn_implementation="eager")
    with pytest.raises(kvplug.SpecError, match=r"'eager' shows a cache no queries.*'sdpa'"):
        model.generate(prompt(5), cache_implementation=SPEC, **GREEDY)
    model.generate(prompt(30), cache_implementation="keydiff(budget=40)", **GREEDY)


def test_votes_of_the_past_count_less_at_each_choice():
    """`h2o` remembers what tokens drew before, also when rows change and caches are copied."""
    layer = one_layer(kvplug.parse("h2o(budget=8, every=4, decay=0.5)"))
    attended(layer, *(normal(2, 1, 12, 8, seed=s) for s in (0, 1)))
    before = layer.memory["mass"].clone()
    assert before.shape == (2, 1, 8)
    layer.reorder_cache(torch.tensor([1, 0]))
    layer = copy.deepcopy(layer)
    assert torch.equal(layer.memory["mass"], before.flip(0))
    shown = layer._candidates()
    assert torch.equal(shown.state["mass"], before.flip(0))
    held = layer.positions.read()["p"].clone()
    for step in range(4):
        attended(layer, *(normal(2, 1, 1, 8, seed=step + s) for s in (2, 9)))
    now, mass = layer.positions.read()["p"], layer.memory["mass"]
    old = (now[..., None] == held[..., None, :]).float() @ before.flip(0)[..., None]
    assert (mass >= 0.5 * old[..., 0] - 1e-6).all()
    assert (mass.sum(-1) <= 0.5 * before.flip(0).sum(-1) + 4 + 1e-5).all()


def test_layers_of_a_pyramid_share_the_budget():
    model = tiny_llama(num_hidden_layers=5)
    out = model.generate(
        prompt(60), cache_implementation="pyramid(budget=24, every=1, window=4, beta=4)",
        return_dict_in_generate=True, **GREEDY,
    )  # fmt: skip
    cache = output_cache(out)
    kept = [39, 32, 24, 16, 9]
    assert [cache.held(i) for i in range(5)] == kept
    told = cache.stats()["retention"]
    each = [[n, n] for n in kept]
    assert told == {"budget": 24, "evictions": 14, "asked": each, "kept": each}


def test_stats_count_what_rows_keep_and_not_their_padding():
    model, out = tiny_llama(), {"return_dict_in_generate": True, **GREEDY}
    rows = left_padded([prompt(n, seed=n)[0] for n in (30, 3)])
    cache = output_cache(model.generate(**rows, cache_implementation=SPEC, **out))
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.stats()["retention"]["kept"] == [[16, 16]] * 2
    assert cache.held() == 19  # as many as the other row had
    plain = output_cache(model.generate(**rows, cache_implementation="growing", **out))
    assert "retention" not in plain.stats()
