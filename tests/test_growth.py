"""A `static` cache whose length nobody has fixed grows between calls; what it holds stays."""

import copy
import gc
import weakref

import pytest
import torch
import torch._dynamo.testing

import kvplug
from kvplug.compat import StaticLayer, cache_argument, output_cache
from kvplug.layers import static, static_coded
from kvplug.layers.buffer import Buffer
from kvplug.testing import tiny_llama
from kvplug.testing.architectures import make
from kvplug.testing.tools import assert_close, normal, prompt, same

pytestmark = pytest.mark.canary

LOSSLESS = ["static", "static+window(length=300)", "static+exact(block=8)+host"]
# `reference`: another kernel's rounding may tip a code of a later layer over
LOSSY = [
    "static+int8(block=8)+reference",
    "static+int4(block=8, tail=8)+reference",
    "static+int8(block=8)+disk+reference",
    "static+window(length=9)",
    "static+sinks(sinks=2, window=9)+int8(block=8)+reference",
]
MODELS = ["llama", "gemma3, sliding", "falcon_h1, mamba in each layer", "qwen3_next, linear hybrid"]


def talk(model, first=None, **given):
    """Three turns with one cache, each longer than the room of the one before; ids and cache."""
    ids, cache = prompt(9), first
    for turn, new in enumerate((6, 8, 16)):
        ids = torch.cat((ids, prompt(5, seed=turn)), 1)
        named = given if cache is None else cache_argument(cache)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
            return_dict_in_generate=True, **named,
        )  # fmt: skip
        ids, cache = out.sequences, output_cache(out)
    return ids, cache


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spec", LOSSLESS)
def test_turns_are_those_of_dynamic_cache(name, spec):
    model = make(name)
    ids, cache = talk(model, cache_implementation=f"kvplug:{spec}")
    assert torch.equal(ids, talk(model)[0])
    assert cache.strategy.layout.limit == ids.shape[1] - 1


@pytest.mark.parametrize("name", ["llama", "gemma3, sliding"])
@pytest.mark.parametrize("spec", LOSSY)
def test_turns_are_those_of_a_cache_that_was_long_enough(name, spec):
    model = make(name)
    ids, grown = talk(model, cache_implementation=f"kvplug:{spec}")
    expected, long = talk(model, kvplug.build(spec, model.config, max_cache_len=ids.shape[1] - 1))
    assert torch.equal(ids, expected)
    assert repr(grown.strategy) == repr(long.strategy)
    for a, b in zip(grown.layers, long.layers, strict=True):
        assert a.strategy == b.strategy
        assert a.get_max_length() == b.get_max_length()
        assert same(a.keys, b.keys)
        assert same(a.values, b.values)
    assert grown.nbytes() <= long.nbytes() + sum(map(_idle, long.layers))


def _idle(layer):
    """Bytes of the rows that a tail may keep idle: see `Buffer.drop_first`."""
    tail = getattr(layer, "tail", None)
    if not isinstance(tail, Buffer):
        return 0
    return sum(32 * x[:, :, :1].nbytes for x in tail.tensors.values())


def test_a_window_that_had_no_room_to_slide_slides():
    """Twelve tokens wide, in room for eight, then for twenty."""
    model, ids = make("mistral, sliding"), prompt(20)
    cache, long = (kvplug.build("static", model.config, max_cache_len=n) for n in (8, 20))
    parts = ids.split([6, 2, 1, 7, 1, 1, 2], 1)
    with torch.no_grad():
        for i, x in enumerate(parts):
            if i == 2:
                cache.grow(20)
            logits = [model(x, **cache_argument(c)).logits for c in (cache, long)]
            assert_close(*logits)
        for c in (cache, long):
            with pytest.raises(kvplug.Evicted):
                c.layers[0].crop(-3)


@pytest.mark.parametrize(
    "said",
    [
        {"cache_implementation": "kvplug:static(max_cache_len=20)"},
        {"cache_implementation": "static(max_cache_len=20)+int8(block=8)"},
        {"cache_implementation": "kvplug:static", "cache_config": {"max_cache_len": 20}},
        {"cache_implementation": "kvplug:static", "max_cache_len": 20},
        {"cache_implementation": "static+host", "max_cache_len": 20},
    ],
    ids=str,
)
def test_a_length_that_was_said_holds(said, monkeypatch):
    model, ids = tiny_llama(), prompt(13)
    out = model.generate(
        ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, **said
    )
    _refused_before_the_model_runs(model, output_cache(out), monkeypatch)


def test_a_length_said_in_the_models_generation_config_or_to_build_holds(monkeypatch):
    model, ids = tiny_llama(), prompt(13)
    model.generation_config.max_cache_len = 20
    out = model.generate(
        ids, max_new_tokens=5, return_dict_in_generate=True, cache_implementation="kvplug:static"
    )
    model.generation_config.max_cache_len = None
    built = kvplug.build("static", model.config, max_cache_len=20)
    for cache in (output_cache(out), built):
        with monkeypatch.context() as patch:
            _refused_before_the_model_runs(model, cache, patch)


def _refused_before_the_model_runs(model, cache, monkeypatch):
    size, ids = cache.nbytes(), prompt(25)
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(
        kvplug.CacheOverflow,
        match=r"max_cache_len=20 holds \d+ tokens and cannot take the 34 that this call may reach; "
        r"build it with max_cache_len >= 34, or let it grow\(34\), or ask for fewer new tokens",
    ):
        model.generate(ids, max_new_tokens=10, **cache_argument(cache))
    assert cache.nbytes() == size
    assert cache.strategy.layout.limit == 20


def filled(spec, room, tokens=19, batch=2):
    """A layer of a Llama with random tokens [batch, 2, tokens, 16] in it, and its cache."""
    cache = kvplug.build(spec, tiny_llama().config, max_cache_len=room)
    for layer in cache.layers:
        layer.update(*(normal(batch, 2, tokens, 16, seed=s) for s in (1, 2)))
        layer.settle()
    return cache


@pytest.mark.parametrize("spec", ["static", *LOSSY])
def test_all_that_a_cache_does_is_right_after_it_has_grown(spec):
    """Recording, rollback, other rows, a copy, `reset`: as in room that was there all along."""
    grown, long = filled(spec, 19), filled(spec, 70)
    for cache in (grown, long):
        cache.activate_past_recording()
    grown.grow(40)
    for cache in (grown, long):
        _update(cache, 21, seed=3)
    grown.grow(70)
    for cache in (grown, long):
        cache.crop(-9)
        cache.deactivate_past_recording()
    _alike(grown, long)
    for cache in (grown, long):
        cache.reorder_cache(torch.tensor([1, 0]))
        _update(cache, 1, seed=5)
        cache.batch_repeat_interleave(2)
        _update(cache, 5, seed=7, batch=4)
        cache.batch_select_indices(torch.tensor([3, 0, 1]))
    twins = [copy.deepcopy(cache) for cache in (grown, long)]
    for cache in (*twins, grown, long):
        _update(cache, 9, seed=9, batch=3)
    _alike(*twins)
    _alike(grown, long)
    for cache in (grown, long):
        cache.reset()
        _update(cache, 70, seed=11, batch=3)
    _alike(grown, long)
    with pytest.raises(kvplug.CacheOverflow, match=r"max_cache_len=70.*let it grow\(71\)"):
        _update(grown, 1, seed=13, batch=3)


def _update(cache, tokens, seed, batch=2):
    for layer in cache.layers:
        layer.update(*(normal(batch, 2, tokens, 16, seed=s) for s in (seed, -seed)))


def _alike(a, b):
    assert int(a.get_seq_length()) == int(b.get_seq_length())
    for x, y in zip(a.layers, b.layers, strict=True):
        assert same(x.keys[:, :, : x.held()], y.keys[:, :, : y.held()])
        assert same(x.values[:, :, : x.held()], y.values[:, :, : y.held()])


@pytest.mark.parametrize(
    "spec", ["static", "static+int8(block=8)", "static+int4(block=8, tail=4)+disk"]
)
def test_the_room_before_is_given_back(spec):
    cache = filled(spec, 24)
    rooms = [weakref.ref(x) for layer in cache.layers for x in _rooms(layer)]
    assert rooms
    cache.grow(24)
    assert all(room() is not None for room in rooms)
    cache.grow(64)
    gc.collect()
    assert not [room for room in rooms if room() is not None]
    # a layer that was built long may have reserved more for a prompt
    assert cache.nbytes() <= filled(spec, 64).nbytes()


def _rooms(layer):
    """Tensors whose size depends on the length."""
    if not hasattr(layer, "blocks"):
        return [layer.keys, layer.values]
    blocks = layer.blocks
    return list((blocks if isinstance(blocks, dict) else blocks.tensors).values())


@pytest.mark.parametrize("spec", ["static", "static+int8(block=8)"])
def test_what_fails_changes_nothing(spec, monkeypatch):
    model = tiny_llama()
    cache, twin = (kvplug.build(spec, model.config, max_cache_len=20) for _ in range(2))
    calls, resized = [], static.resized

    def short_of_memory(room, rows):
        calls.append(rows)
        if len(calls) == 4:
            raise torch.OutOfMemoryError
        return resized(room, rows)

    with torch.no_grad():
        for c in (cache, twin):
            model(prompt(17), **cache_argument(c))
        for module in (static, static_coded):
            monkeypatch.setattr(module, "resized", short_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            cache.grow(50)
        assert cache.nbytes() == twin.nbytes()
        assert cache.strategy == twin.strategy
        x = prompt(3, seed=1)
        assert same(*(model(x, **cache_argument(c)).logits for c in (cache, twin)))
        with pytest.raises(kvplug.CacheOverflow, match="max_cache_len=20 holds 20 tokens"):
            model(prompt(1), **cache_argument(cache))


def test_layers_of_transformers_own_do_not_grow():
    cache = kvplug.build("static", tiny_llama().config, max_cache_len=20)
    cache.layers[1] = StaticLayer(max_cache_len=20)
    with pytest.raises(
        kvplug.CacheOverflow,
        match=r"max_cache_len=20 cannot grow to 30: layers of transformers' own have a fixed "
        r"length: StaticLayer; build it with max_cache_len >= 30",
    ):
        cache.grow(30)


def test_a_growing_cache_has_nothing_to_grow():
    cache = kvplug.build("int8", tiny_llama().config)
    cache.grow(1000)
    assert cache.strategy == kvplug.parse("int8")


@pytest.mark.parametrize("spec", ["static", "static+int8(block=8)+reference"])
def test_a_compiled_step_is_compiled_once_more(spec):
    model = tiny_llama(num_hidden_layers=1)
    cache, eager = (kvplug.build(spec, model.config, max_cache_len=20) for _ in range(2))
    cache_is_exact = cache.strategy.codec.lossless
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=count, fullgraph=True)
    def decode(token, cache):
        return model(token, **cache_argument(cache)).logits

    with torch.no_grad():
        for c in (cache, eager):
            model(prompt(13), **cache_argument(c))
        seed = 0
        for compiled, room in enumerate((20, 41, 60), 1):
            for c in (cache, eager):
                c.grow(room)
            while int(cache.get_seq_length()) < room:
                token, seed = prompt(1, seed=seed), seed + 1
                ours, wanted = decode(token, cache), model(token, **cache_argument(eager)).logits
                # a rounding may tip a code over
                assert float((ours - wanted).abs().max()) < (1e-4 if cache_is_exact else 2e-2)
            assert count.frame_count == compiled
            with pytest.raises(kvplug.CacheOverflow, match=f"max_cache_len={room}"):
                decode(prompt(1), cache)
    torch._dynamo.reset()
    for a, b in zip(cache.layers, eager.layers, strict=True):
        off = (a.keys - b.keys).abs() > 1e-4
        # one code tips a token, one zero or scale a block, of which 8 tokens of 16 channels
        assert int(off.sum()) <= (0 if cache_is_exact else 2 * 8 * 16)


def test_a_cache_grows_between_inference_mode_and_the_rest():
    model = tiny_llama()
    cache = kvplug.build("static", model.config, max_cache_len=12)
    with torch.inference_mode():
        model(prompt(12), **cache_argument(cache))
        cache.grow(14)
        model(prompt(1), **cache_argument(cache))
    with torch.no_grad():
        model(prompt(1), **cache_argument(cache))
    assert int(cache.get_seq_length()) == 14
