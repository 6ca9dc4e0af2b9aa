"""`static`: one graph for decode steps of every length, never past the end."""

import copy

import pytest
import torch
import torch._dynamo.testing
import transformers
from transformers import DynamicCache

import kvplug
from kvplug.compat import cache_argument, output_cache
from kvplug.testing import tiny_llama
from kvplug.testing.tools import assert_close, dense, normal, prompt, random_model

pytestmark = pytest.mark.canary

# `reference`: another kernel's rounding may tip a code of a later layer over
SPECS = ["static", "static+int8(block=8)+reference", "static+int4(block=8, tail=8)+reference"]
BY_LAYER = "static+int4(block=8, tail=8)+reference+int8(block=8)@0"  # of two
BY_LAYER_EXACT = "static+reference+int8(block=8)@-1"
LAYERS = {"eager": 2, "aot_eager": 1}  # by backend: what they cost is compiling, not steps


@pytest.fixture(autouse=True)
def dynamo():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def compiled_decode(model, backend):
    """A decode step as one graph that may be compiled only once."""

    def step(token, cache):
        return model(token, **cache_argument(cache)).logits

    count = torch._dynamo.testing.CompileCounterWithBackend(backend)
    return torch.compile(step, backend=count, fullgraph=True), count


@pytest.mark.parametrize(
    ("backend", "spec"),
    [
        *(("aot_eager", spec) for spec in SPECS),
        *(("eager", spec) for spec in (SPECS[0], SPECS[2], BY_LAYER, BY_LAYER_EXACT)),
    ],
)
def test_compiled_once_for_all_lengths(spec, backend):
    """Forty steps over block borders: one graph, no recompilation, what eager steps give."""
    model, ids = tiny_llama(num_hidden_layers=2 if "@" in spec else LAYERS[backend]), prompt(13)
    steps = prompt(40, seed=1)
    cache, eager = (kvplug.build(spec, model.config, max_cache_len=64) for _ in range(2))
    assert cache.is_compileable
    decode, count = compiled_decode(model, backend)
    with torch.no_grad():
        model(ids, **cache_argument(cache))
        model(ids, **cache_argument(eager))
        for i in range(40):
            token = steps[:, i : i + 1]
            assert_close(decode(token, cache), model(token, **cache_argument(eager)).logits)
    assert count.frame_count == 1
    assert int(cache.get_seq_length()) == int(eager.get_seq_length()) == 53
    for a, b in zip(cache.layers, eager.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, atol=1e-4, rtol=1e-4)
    assert sum(cache.stats()["materialised"].values()) == 0


def test_inductor():
    """The compiler that users run, once. Fused arithmetic may tip a code of int8 over."""
    model, ids = tiny_llama(num_hidden_layers=1), prompt(13)
    cache, eager = (
        kvplug.build("static+int8(block=8)", model.config, max_cache_len=40) for _ in range(2)
    )
    decode, count = compiled_decode(model, "inductor")
    with torch.no_grad():
        model(ids, **cache_argument(cache))
        model(ids, **cache_argument(eager))
        for i in range(20):
            token = prompt(1, seed=i)
            a, b = decode(token, cache), model(token, **cache_argument(eager)).logits
            assert (a - b).abs().max() < 0.01 * b.abs().max()
    assert count.frame_count == 1


@pytest.mark.parametrize("spec", SPECS)
def test_reset_needs_no_new_graph(spec):
    model = tiny_llama(num_hidden_layers=1)
    cache = kvplug.build(spec, model.config, max_cache_len=48)
    decode, count = compiled_decode(model, "eager")
    results = []
    with torch.no_grad():
        for _ in range(2):
            model(prompt(17), **cache_argument(cache))
            results.append([decode(prompt(1, seed=i), cache) for i in range(12)])
            cache.reset()
    assert count.frame_count == 1
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("spec", SPECS)
def test_overflow_is_an_error_and_changes_nothing(spec):
    model = tiny_llama()
    cache = kvplug.build(spec, model.config, max_cache_len=20)
    with torch.no_grad():
        model(prompt(19), **cache_argument(cache))
        model(prompt(1), **cache_argument(cache))
        before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        with pytest.raises(
            kvplug.CacheOverflow,
            match=r"static cache of max_cache_len=20 holds 20 tokens and cannot take 1 more; "
            r"build it with max_cache_len >= 21",
        ):
            model(prompt(1), **cache_argument(cache))
        with pytest.raises(kvplug.CacheOverflow, match="cannot take 5 more"):
            model(prompt(5), **cache_argument(cache))
    assert int(cache.get_seq_length()) == 20
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


@pytest.mark.parametrize(
    ("backend", "spec"), [*zip(("eager", "aot_eager", "eager"), SPECS, strict=True)]
)
def test_overflow_of_a_compiled_step(spec, backend):
    model = tiny_llama(num_hidden_layers=1)
    cache = kvplug.build(spec, model.config, max_cache_len=20)
    decode, _ = compiled_decode(model, backend)
    with torch.no_grad():
        model(prompt(18), **cache_argument(cache))
        for i in range(2):
            decode(prompt(1, seed=i), cache)
        before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        with pytest.raises(kvplug.CacheOverflow, match="max_cache_len=20"):
            decode(prompt(1), cache)
    assert int(cache.get_seq_length()) == 20
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_compiled_equals_dynamic():
    model, ids = tiny_llama(), prompt(30)
    plain = model.generate(ids, max_new_tokens=20, do_sample=False)
    cache, dynamic = kvplug.build("static", model.config, max_cache_len=64), DynamicCache()
    decode, _ = compiled_decode(model, "eager")
    with torch.no_grad():
        logits = model(ids, **cache_argument(cache)).logits[:, -1:]
        assert_close(logits, model(ids, **cache_argument(dynamic)).logits[:, -1:])
        out = [logits.argmax(-1)]
        for _ in range(19):
            out.append(decode(out[-1], cache)[:, -1:].argmax(-1))
    assert torch.equal(torch.cat((ids, *out), 1), plain)


def test_what_compiles_says_so():
    config = tiny_llama().config
    compileable = {
        "static": True,
        "static+int8": True,
        "growing": False,
        "int8": False,
        "static+window(length=9)": False,
        "static+host": False,
        "static+sinks+disk": False,
    }
    for spec, expected in compileable.items():
        assert kvplug.build(spec, config, max_cache_len=64).is_compileable is expected


def test_room_must_be_known():
    with pytest.raises(kvplug.SpecError, match="'static' needs max_cache_len"):
        kvplug.build("static", tiny_llama().config)
    cache = kvplug.build("static(max_cache_len=33)", tiny_llama().config)
    assert cache.get_max_length() == 33
    both = kvplug.build("static(max_cache_len=33)", tiny_llama().config, max_cache_len=99)
    assert both.get_max_length() == 33


@pytest.mark.parametrize("spec", ["static", "static+int8(block=8)"])
def test_room_is_reserved_once(spec):
    model = tiny_llama()
    cache = kvplug.build(spec, model.config, max_cache_len=64)
    with torch.no_grad():
        model(prompt(5), **cache_argument(cache))
        size = cache.nbytes()
        for i in range(40):
            model(prompt(1, seed=i), **cache_argument(cache))
        assert cache.nbytes() == size
        twin = copy.deepcopy(cache)
        model(prompt(1), **cache_argument(twin))
    assert twin.nbytes() == size
    assert int(cache.get_seq_length()) == 45


@pytest.mark.parametrize(
    "spec", ["window(length=9)", "sinks(sinks=2, window=9)+int8(block=8)", "host"]
)
def test_reserved_but_not_compiled_overflows_too(spec):
    model = tiny_llama()
    cache = kvplug.build(f"static+{spec}", model.config, max_cache_len=20)
    with torch.no_grad():
        model(prompt(20), **cache_argument(cache))
        with pytest.raises(kvplug.CacheOverflow, match="holds 20 tokens and cannot take 1 more"):
            model(prompt(1), **cache_argument(cache))
    assert cache.get_seq_length() == 20


def test_generate_reserves_what_it_needs():
    model, ids = tiny_llama(), prompt(10)
    out = model.generate(
        ids, max_new_tokens=7, cache_implementation="kvplug:static", return_dict_in_generate=True
    )
    assert output_cache(out).get_max_length() >= 16
    out = model.generate(
        ids,
        max_new_tokens=7,
        max_cache_len=50,
        cache_implementation="kvplug:static",
        return_dict_in_generate=True,
    )
    assert output_cache(out).get_max_length() == 50


@pytest.mark.parametrize("spec", ["static+int8(block=8)", "static+int4(block=8, tail=8)"])
def test_a_rollback_of_recorded_tokens_leaves_no_trace(spec):
    """Bytes and numbers are those of a layer that never saw the guesses."""
    config = tiny_llama().config
    plain, guessing = (kvplug.build(spec, config, max_cache_len=90).layers[0] for _ in range(2))

    def same():
        assert plain.held() == guessing.held()
        assert int(plain.block_count) == int(guessing.block_count)
        assert torch.equal(plain.keys, guessing.keys)
        assert torch.equal(plain.values, guessing.values)

    def tokens(n, seed):
        return normal(2, 2, n, 16, seed=seed), normal(2, 2, n, 16, seed=-seed)

    for layer in (plain, guessing):
        layer.update(*tokens(21, 1))
    guessing.activate_past_recording()
    assert guessing.is_croppable
    assert not guessing.is_compileable
    for seed, (guesses, wrong) in enumerate([(20, 19), (5, 5), (9, 0), (1, 1), (3, 1)], 2):
        encoded, new = int(guessing.block_count), tokens(guesses, seed)
        seen = guessing.held()
        keys, values = (dense(x) for x in guessing.update(*new))
        assert torch.equal(keys[:, :, seen : seen + guesses], new[0])
        assert torch.equal(values[:, :, seen : seen + guesses], new[1])
        assert int(guessing.block_count) == encoded
        if guesses == 5:
            for layer in (plain, guessing):
                layer.reorder_cache(torch.tensor([1, 0]))
        guessing.crop(-wrong)
        if guesses > wrong:
            plain.update(*(x[:, :, : guesses - wrong] for x in new))
        same()
    for layer in (plain, guessing):
        layer.update(*tokens(20, 9))
    guessing.deactivate_past_recording()
    assert guessing.is_compileable
    same()
    guessing.activate_past_recording()
    guessing.update(*tokens(20, 10))
    guessing.reset()
    assert guessing.is_compileable
    for layer in (plain, guessing):
        if layer is plain:
            layer.reset()
        layer.update(*tokens(30, 11))
    same()


def test_a_compiled_model_may_take_several_tokens_and_record():
    """Steps of other shapes than a decode step run between graphs."""
    model = tiny_llama(num_hidden_layers=1)
    spec = "static+int8(block=8)+reference"
    ours, eager = (kvplug.build(spec, model.config, max_cache_len=64) for _ in range(2))
    with torch._dynamo.config.patch(error_on_recompile=False), torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        for S, record in ((21, False), (1, False), (3, True), (1, True)):
            for cache, run in ((ours, compiled), (eager, model)):
                if record:
                    cache.activate_past_recording()
                cache.logits = run(prompt(S, seed=S), **cache_argument(cache)).logits
                if record:
                    cache.crop(-S // 2)
            assert_close(ours.logits, eager.logits)


def sliding(**options):
    """A Mistral whose layers all slide, at 24 tokens."""
    config = transformers.MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=24,
        initializer_range=0.3, **options,
    )  # fmt: skip
    return random_model(config)


@pytest.mark.parametrize(
    "modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)]
)
def test_windows_pass_between_inference_mode_and_the_rest(modes):
    model, parts = sliding(), prompt(40, 2).split([20, 1, 9, *[1] * 10], dim=1)

    def run(first, second):
        with first():
            cache, out = kvplug.build("static", model.config, max_cache_len=64), []
        for i, ids in enumerate(parts):
            with (first, second)[i % 2]():
                out.append(model(ids, **cache_argument(cache)).logits)
        with second():
            cache.reset()
            return [*out, model(parts[0], **cache_argument(cache)).logits]

    expected = run(torch.no_grad, torch.no_grad)
    for a, b in zip(run(*modes), expected, strict=True):
        assert torch.equal(a, b)


def test_windows_refuse_gradients_aloud():
    model = sliding()
    cache = kvplug.build("static", model.config, max_cache_len=64)
    with pytest.raises(kvplug.NoGradient, match=r"'static.*' passes no gradient"):
        model(prompt(8), **cache_argument(cache)).logits.sum().backward()
    with pytest.raises(kvplug.NoGradient, match="or end training mode"):
        model.train()(prompt(8), **cache_argument(cache))


def test_windows_take_no_other_batch():
    model = sliding()
    cache = kvplug.build("static", model.config, max_cache_len=64)
    with torch.no_grad():
        model(prompt(8, 2), **cache_argument(cache))
        with pytest.raises(
            kvplug.Mismatch, match="batch size 2 and cannot take keys of batch size 1"
        ):
            model(prompt(8), **cache_argument(cache))
