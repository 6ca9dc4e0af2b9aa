"""Keys that swing within a block: they get more bits, or are refused."""

import copy
import math

import pytest
import torch

import kvplug
from evals.measure.biased import biased, channel
from kvplug.codecs import rotated
from kvplug.codecs.guard import swings
from kvplug.codecs.hadamard import turn
from kvplug.compat import cache_argument
from kvplug.testing.oracle import one_layer
from kvplug.testing.tools import left_padded, normal, prompt, same, tiny_llama


def swinging(times, period, tokens=64, D=64, B=1, H=2):
    """Normal keys [B, H, tokens, D], a constant in one channel, turned with its partner."""
    keys, at = normal(B, H, tokens, D, seed=0), torch.arange(tokens) * (2 * math.pi / period)
    keys[..., 3] += times * at.cos()
    keys[..., 3 + D // 2] += times * at.sin()
    return keys


def hostile(keys, block=64):
    """Of keys [B, H, T, D] that are turned as a codec turns them."""
    return swings(turn(keys).unflatten(2, (-1, block)))


@pytest.mark.parametrize("period", [20, 64])
def test_what_goes_round_within_a_block_is_found(period):
    for times in (30, 1000):
        assert hostile(swinging(times, period))
    for times in (0, 1):
        assert not hostile(swinging(times, period))


def test_what_stays_is_left_to_the_zero_of_a_block():
    assert not hostile(swinging(1000, 1e6))


def test_one_row_is_enough():
    keys = normal(3, 2, 64, 64, seed=1)
    keys[2] = swinging(30, 20)[0]
    assert hostile(keys)
    assert not hostile(keys[:2])


@pytest.mark.parametrize("block", [2, 8, 64, 256])
def test_numbers_without_memory_do_not_swing_at_any_block(block):
    for seed in range(20):
        assert not hostile(normal(1, 2, 256, 64, seed=seed), block)


@pytest.mark.parametrize("value", [0.0, 1.0, torch.nan, torch.inf])
def test_what_does_not_move_or_is_no_number_does_not_swing(value):
    assert not hostile(torch.full((1, 1, 64, 64), value))
    assert not hostile(torch.ones(1, 1, 0, 64))
    assert not hostile(torch.ones(1, 1, 64, 64), block=1)


def filled(spec, keys, layer=None):
    layer = layer or one_layer(kvplug.parse(spec), torch.zeros(len(keys), dtype=torch.long))
    layer.update(keys, keys)
    layer.settle()
    return layer


def test_such_keys_have_8_bits_and_an_error_of_as_many(caplog):
    keys = swinging(30, 20, tokens=128)
    layer = filled("int4(tail=0, first=0)", keys)
    assert layer.strategy.codec == kvplug.parse("int(tail=0, first=0, k_bits=8)").codec
    assert "such layers get int(tail=0, first=0, k_bits=8)" in caplog.text
    assert layer.stats.swinging
    assert (layer.keys - keys).abs().max() < 0.5
    assert not same(layer.keys, keys)
    layer.reset()
    assert layer.strategy.codec.k_bits == 4
    filled("", normal(1, 2, 128, 64, seed=1), layer)
    assert layer.strategy.codec.k_bits == 4


@pytest.mark.parametrize("name", ["int3", "int8"])
def test_strict_refuses_and_says_what_would_do(name):
    spec = f"{name}(tail=0, first=0, strict=True)"
    filled(spec, normal(1, 2, 64, 64, seed=1))
    with pytest.raises(kvplug.SpecError) as e:
        filled(spec, swinging(30, 20))
    assert str(e.value).startswith(f"{name}(")
    assert "strict=True): keys of this model swing within a block" in str(e.value)
    assert "use 'growing', which is exact, or leave out strict" in str(e.value)


@pytest.mark.parametrize("name", ["int8", "k8v4"])
def test_keys_that_have_8_bits_already_are_told_of(name, caplog):
    layer = filled(f"{name}(tail=0, first=0)", normal(1, 2, 64, 64, seed=1))
    assert not layer.stats.swinging
    layer = filled(f"{name}(tail=0, first=0)", swinging(30, 20))
    assert layer.stats.swinging
    assert layer.strategy.codec == layer.slot.strategy.codec
    assert "keys of this model swing" in caplog.text


@pytest.mark.parametrize("layout", ["growing", "static"])
def test_a_cache_says_so_and_copies_go_on(layout):
    model = tiny_llama()
    spec = f"{layout}+int4(block=16, tail=0)"
    ids = prompt(60)
    with biased(model, ids[0], channel(model, 16), 30), torch.no_grad():
        cache = kvplug.build(spec, model.config, max_cache_len=96)
        assert cache.stats()["widened"] == {}
        model(ids, **cache_argument(cache))
        wide = {"int(block=16, tail=0, k_bits=8)": [*range(len(cache.layers))]}
        assert cache.stats()["widened"] == wide
        twin = copy.deepcopy(cache)
        assert twin.stats()["widened"] == wide
        assert cache.stats()["swinging"] is twin.stats()["swinging"] is True
        more = prompt(20, seed=1)
        a, b = (model(more, **cache_argument(x)).logits for x in (cache, twin))
        assert same(a, b)
        other = kvplug.build(spec, model.config, max_cache_len=96)
        other.load_state_dict(cache.state_dict())
        assert same(other.layers[0].keys, cache.layers[0].keys)
    plain = kvplug.build(spec, model.config, max_cache_len=96)
    model(ids, **cache_argument(plain))
    assert plain.stats()["widened"] == {}
    assert plain.stats()["swinging"] is False


def test_chunks_of_a_store_have_the_width_they_were_stored_with():
    model, ids, store = tiny_llama(), prompt(60), kvplug.Store("memory://")
    config = {"block": 8, "tail": 0, "store": store, "chunk": 16}
    with biased(model, ids[0], channel(model, 16), 30):
        answers = []
        for _ in range(2):
            how = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
            out = model.generate(ids, cache_implementation="int4", cache_config=dict(config), **how)
            held = getattr(out, "cache", None) or out.past_key_values
            assert [*held.stats()["widened"]] == ["int(block=8, tail=0, k_bits=8)"]
            answers.append((out.sequences, held.reused_tokens, held.layers[0].keys))
    (a, none, x), (b, some, y) = answers
    assert (none == 0) < some
    assert same(a, b)
    assert same(x, y)


def test_rows_that_want_different_widths_are_computed_together(monkeypatch):
    """What a store has of one row does not fit beside another's: all is computed."""
    model, store = tiny_llama(), kvplug.Store("memory://")
    said = iter([True, True])  # both layers of the first row, no others
    monkeypatch.setattr(rotated, "swings", lambda keys: next(said, False))
    inputs = left_padded([prompt(60, seed=1)[0], prompt(50, seed=2)[0]])
    how = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "int4"}
    own = {"block": 8, "tail": 0}
    out = model.generate(**inputs, **how, cache_config=own | {"store": store, "chunk": 16})
    assert next(said, None) is None
    assert same(out, model.generate(**inputs, **how, cache_config=own))
    assert store.stats()["fallbacks"] == {"rows whose keys want different widths": 1}
