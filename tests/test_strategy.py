"""Codecs of single layers, and what becomes of a strategy for a model."""

import pytest
import torch
from transformers import GPT2Config

import kvplug
from kvplug.compat import cache_argument, output_cache
from kvplug.layers.layout import Growing
from kvplug.testing import tiny_llama, walked_bytes
from kvplug.testing.tools import normal, prompt, same

MIXED = "int4(block=8, tail=8)+int8(block=8)@(0, -1)+int2(block=16, tail=0)@1"
OF_LAYER = ["int8(block=8)", "int2(block=16, tail=0)", "int4(block=8, tail=8)", "int8(block=8)"]


def config(layers=4):
    return tiny_llama(num_hidden_layers=layers).config


def test_each_layer_has_its_codec():
    strategy = kvplug.parse(f"sinks(sinks=2, window=30)+host+{MIXED}")
    cache = kvplug.build(strategy, config())
    for i, (layer, spec) in enumerate(zip(cache.layers, OF_LAYER, strict=True)):
        alone = kvplug.parse(f"sinks(sinks=2, window=30)+host+{spec}")
        assert strategy.at(i, 4) == layer.strategy == alone
    assert cache.strategy == strategy == kvplug.parse(cache.stats()["strategy"])
    plain = kvplug.parse("int4+host")
    assert plain.at(3, 4) is plain


@pytest.mark.parametrize("rest", ["", "+static", "+host", "+window(length=20)"])
def test_a_layer_holds_what_it_would_in_a_cache_of_its_codec_alone(rest):
    """Block by block, byte for byte."""
    caches = [kvplug.build(s + rest, config(), max_cache_len=64) for s in (MIXED, *OF_LAYER)]
    mixed, alone = caches[0], caches[1:]
    assert mixed.is_compileable == ("static" in rest)
    for i, own in enumerate(alone):
        for seed, S in enumerate((21, 1, 1, 9, 1)):
            new = normal(2, 2, S, 16, seed=seed), normal(2, 2, S, 16, seed=-seed)
            sizes = [cache.layers[i].get_mask_sizes(S) for cache in (mixed, own)]
            assert sizes[0] == sizes[1]
            mixed.update(*new, i)
            own.update(*new, i)
        *columns, data = mixed.layers[i].encoded()
        *expected, blocks = own.layers[i].encoded()
        assert columns == expected
        assert columns[1] > 0
        assert all(same(data[name], x) for name, x in blocks.items())


@pytest.mark.parametrize("rest", ["", "+static", "+host"])
def test_bytes_are_those_of_the_layers(rest):
    model = tiny_llama(num_hidden_layers=4)
    held = {}
    for spec in (MIXED, *OF_LAYER[:3], "int8(block=8)@0"):
        cache = kvplug.build(spec + rest, model.config, max_cache_len=100)
        with torch.no_grad():
            model(prompt(100), **cache_argument(cache))
        assert cache.nbytes() == walked_bytes(cache)
        estimated = kvplug.estimate(spec + rest, model.config, context=100)
        assert estimated == pytest.approx(cache.nbytes(), rel=0.01)
        held[spec] = estimated
    int8, int2, int4 = (held[spec] / 4 for spec in OF_LAYER[:3])
    assert held[MIXED] == pytest.approx(2 * int8 + int2 + int4, rel=0.01)


def test_layers_that_are_exact_and_layers_that_are_not_under_static():
    """All say the same of their columns, as one mask serves them; the exact ones lose nothing."""
    cache = kvplug.build("static+exact(block=8)+int8(block=8)@1", config(2), max_cache_len=64)
    assert cache.is_compileable
    new = [(normal(2, 2, S, 16, seed=S), normal(2, 2, S, 16, seed=-S)) for S in (21, 1, 3, 9, 1)]
    for pair in new:
        sizes = [layer.get_mask_sizes(pair[0].shape[2]) for layer in cache.layers]
        assert sizes[0] == sizes[1]
        for layer in (0, 1):
            assert cache.update(*pair, layer)[0].shape[2] == sizes[0][0]
    exact, coded = cache.layers
    for i, side in enumerate(zip(*new, strict=True)):
        given = torch.cat(side, dim=2)
        assert torch.equal((exact.keys, exact.values)[i], given)
        assert not torch.equal((coded.keys, coded.values)[i], given)


def test_a_model_runs_over_exact_and_coded_layers_alike():
    model, ids = tiny_llama(), prompt(23)
    caches = [
        kvplug.build(spec, model.config, max_cache_len=64)
        for spec in ("int8(block=8)@1", "static+int8(block=8)@1", "int8(block=8)+exact@0")
    ]
    with torch.no_grad():
        for part in (ids, *prompt(20, seed=3).split(1, dim=1)):
            a, *others = (model(part, **cache_argument(cache)).logits for cache in caches)
            for b in others:
                assert (a - b).abs().max() < 0.01 * a.abs().max()  # a rounding may tip a code over
    assert all(torch.equal(caches[0].layers[0].keys, x.layers[0].keys) for x in caches[1:])
    assert [cache.stats()["blocks_encoded"] for cache in caches] == [4, 4, 4]


@pytest.mark.parametrize("layout", ["", "static+"])
def test_generate_by_name(layout):
    model, ids = tiny_llama(num_hidden_layers=4), prompt(30)
    out = model.generate(
        ids, cache_implementation=layout + MIXED, max_new_tokens=20, return_dict_in_generate=True
    )
    cache = output_cache(out)
    assert [str(layer.strategy.codec) for layer in cache.layers] == OF_LAYER
    assert cache.stats()["blocks_encoded"] == 5 + 2 + 4 + 5  # of 49 tokens, 4 of which stay


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("int4+int8@4", "there is no layer 4 in a model of 4: they are 0 to 3, or -1 to -4 from"),
        ("int4+int8@(0, -5)", "there is no layer -5 in a model of 4"),
        ("int4+int8@(0, -1)+int2@3", "layer 3 of 4 is named twice, once as 3"),
        ("int4+int8@(-4, 0)", "layer 0 of 4 is named twice, once as 0"),
    ],
)
def test_layers_that_cannot_be(spec, text, monkeypatch):
    """An error before the model runs."""
    model = tiny_llama(num_hidden_layers=4)
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(kvplug.SpecError) as e:
        model.generate(prompt(3), cache_implementation=spec, max_new_tokens=3)
    assert str(e.value).startswith(f"{spec}: {text}")


def test_a_codec_for_a_layer_that_has_no_use_for_it():
    from transformers import Gemma2Config

    hybrid = Gemma2Config(
        num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2
    )
    assert kvplug.build("int4+int8@0", hybrid).layers[0].strategy.codec.name == "int8"
    with pytest.raises(
        kvplug.SpecError, match=r"int8 cannot serve layer 2 of Gemma2Config, a StaticSlid"
    ):
        kvplug.build("static+int4+int8@(1, 2)", hybrid, max_cache_len=64)
    assert kvplug.build("static+int4+int8@(1, 3)", hybrid, max_cache_len=64).is_compileable


def test_a_codec_of_one_layer_must_compose_too():
    with pytest.raises(
        kvplug.SpecError, match=r"triton' reads blocks of .* plain, affine, rotated, .*; 'fp8"
    ):
        kvplug.parse("int4+fp8@0+triton")


def test_arguments_by_name_are_the_main_codecs():
    strategy = kvplug.parse("int4+int8@0", {"block": 8})
    assert strategy == kvplug.parse("int4(block=8)+int8@0")


# --- concrete for a model


def test_resolve_fills_in_the_room():
    gpt = GPT2Config()
    strategy = kvplug.parse("static+int8")
    assert strategy.resolve(gpt, max_cache_len=9) == kvplug.parse("static(max_cache_len=9)+int8")
    known = kvplug.parse("static(max_cache_len=5)")
    assert known.resolve(gpt, max_cache_len=9) == known.resolve(gpt) == known
    with pytest.raises(kvplug.SpecError, match="'static' needs max_cache_len"):
        strategy.resolve(gpt)
    assert strategy.resolve(gpt, open_ended=True) == strategy.replace(layout=Growing())
    growing = kvplug.parse(MIXED)
    assert growing.resolve(gpt, max_cache_len=9) == growing


def test_resolve_knows_what_reads_dense_tensors_only():
    flex = GPT2Config(attn_implementation="flex_attention")
    assert kvplug.parse("window").resolve(flex) == kvplug.parse("window+reference")
    for spec in ("int4", "host", "int8@0"):
        with pytest.raises(kvplug.SpecError, match=r"flex_attention.*choose 'sdpa'"):
            kvplug.parse(spec).resolve(flex)
