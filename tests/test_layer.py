"""What callers hand to a layer that is not quite what its signature says."""

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import kvplug
from kvplug.compat import cache_argument
from kvplug.placement.device import OnDevice
from kvplug.testing import tiny_llama
from kvplug.testing.oracle import EACH, STEP, Machine
from kvplug.testing.tools import DRAWN, assert_close, dense, normal, prompt

SPECS = ["growing", "int8(block=8)", "window(length=20)", "static", "static+int8(block=8)"]


@pytest.mark.parametrize("spec", SPECS)
def test_crop_takes_a_tensor(spec):
    """As transformers 5.17 calls it in assisted decoding."""
    cache = kvplug.build(spec, tiny_llama().config, max_cache_len=32)
    for layer in cache.layers:
        layer.update(torch.ones(1, 2, 13, 16), torch.ones(1, 2, 13, 16))
    cache.crop(torch.tensor(-3))
    assert int(cache.get_seq_length()) == 10
    assert type(cache.held()) is int
    with pytest.raises(ValueError, match="crop takes minus the number of tokens to remove, got 3"):
        cache.crop(torch.tensor(3))


def test_a_prompt_in_pieces_has_room_from_the_first_on():
    """No piece moves what came before it; what comes after the prompt takes room as ever."""
    cache = kvplug.build("growing", tiny_llama().config)
    layer = cache.layers[0]
    for length in (40, 70):  # and after `reset` anew
        cache.reset()
        cache.expect(length)
        places = set()
        for _ in range(4):
            layer.update(torch.ones(1, 2, 10, 16), torch.ones(1, 2, 10, 16))
            places.add(layer.tail.tensors["k"].data_ptr())
        assert (len(places), layer.tail.capacity) == (1, length)
    layer.update(torch.ones(1, 2, 33, 16), torch.ones(1, 2, 33, 16))
    assert layer.tail.capacity >= 73


@pytest.mark.parametrize("spec", ["int8(block=8)", "static+int8(block=8)", "exact(block=8)+host"])
def test_a_forward_pass_with_gradients_leaves_no_graph_behind(spec):
    """Where a cache passes none; the others are tested with `test_gradients`."""
    model = tiny_llama()
    cache = kvplug.build(spec, model.config, max_cache_len=32)
    for ids in prompt(12).split([9, 1, 1, 1], dim=1):
        logits = model(ids, **cache_argument(cache)).logits
    assert logits.requires_grad
    assert not cache.layers[0].keys.requires_grad
    assert not cache.layers[0].values.requires_grad


STRATEGIES = [
    "growing",
    "static",
    "window(length=20)",
    "sinks(sinks=2, window=18)",
    "int8(block=8)",
    "static+int8(block=8)",
    "sinks(sinks=2, window=18)+int4(block=8, tail=8)",
    "exact(block=8)+host",
    "int4(block=8, tail=8)+disk",
]


@pytest.mark.parametrize("spec", STRATEGIES)
def test_a_cache_passes_between_inference_mode_and_the_rest(spec):
    """Filled in one, used in the other and back, with everything that changes it, as in neither."""
    model, steps = tiny_llama(), prompt(70, 2).split([30, 1, 1, 9, *[1] * 14, 15], dim=1)

    def run(modes):
        out = []
        with modes[0]():
            cache = kvplug.build(spec, model.config, max_cache_len=96)
        for i, ids in enumerate(steps):
            with modes[i % 3 == 0]():
                out.append(model(ids, **cache_argument(cache)).logits)
                if i == 2:
                    cache.reorder_cache(torch.tensor([1, 1]))
                if i == 5:
                    cache.activate_past_recording()
                if i == 9:
                    cache.crop(-2)
                    cache.batch_repeat_interleave(2)
                    cache.batch_select_indices(torch.tensor([0, 2]))
                    cache = copy.deepcopy(cache)
        with modes[1]():
            cache.reset()
            out.append(model(steps[0], **cache_argument(cache)).logits)
        return out

    modes = (torch.no_grad, torch.inference_mode)
    expected = run((torch.no_grad, torch.no_grad))
    for first in (modes, modes[::-1]):
        assert all(torch.equal(a, b) for a, b in zip(run(first), expected, strict=True))


def test_a_copy_does_not_take_along_what_is_under_way():
    """On CUDA it may not have arrived, and the copy's place would not wait for it."""
    cache = kvplug.build("int8(block=8)+host", tiny_llama().config)
    with torch.no_grad():
        tiny_llama()(prompt(20), **cache_argument(cache))
    layer = cache.layers[0]
    layer._fetched = {name: torch.zeros_like(x) for name, x in layer.blocks.read().items()}
    twin = copy.deepcopy(layer)
    assert layer._fetched is not None
    assert torch.equal(twin.keys, layer.keys)
    new = normal(1, 2, 1, 16, seed=0)
    layer._fetched = None
    for a, b in zip(twin.update(new, new), layer.update(new, new), strict=True):
        assert torch.equal(dense(a), dense(b))


class Copies(OnDevice):
    """Brings copies, as host memory does to CUDA."""

    def prefetch(self, data, device):
        return {name: x.clone() for name, x in data.items()}


class Early(Machine):
    """Has blocks under way after each update, whatever happens to the layer before the next."""

    def update(self, S):
        super().update(S)
        self.layer.place = Copies()
        self.layer.prefetch()
        assert not len(self.layer.blocks) or self.layer._fetched


@pytest.mark.parametrize("spec", ["int8(block=8)", "sinks(sinks=2, window=18)+exact(block=8)+host"])
@given(steps=st.lists(STEP, min_size=3, max_size=24))
@example(steps=EACH)
@settings(DRAWN, max_examples=40)
def test_blocks_under_way_are_not_read_once_they_have_changed(spec, steps):
    Early(kvplug.parse(spec), [0, 3, 1]).run([("update", 20), *steps, ("update", 1)])


@pytest.mark.parametrize("spec", STRATEGIES)
def test_what_inference_mode_filled_is_read_where_gradients_are_recorded(spec):
    model, ids = tiny_llama(), prompt(40)
    logits = []
    for mode in (torch.inference_mode, torch.no_grad):
        cache = kvplug.build(spec, model.config, max_cache_len=64)
        with mode():
            for part in ids.split([30, 1, 9], dim=1):
                model(part, **cache_argument(cache))
        out = model(ids[:, :1], **cache_argument(cache)).logits
        assert out.requires_grad
        logits.append(out.detach())
    assert_close(*logits)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda k: k[:1], "keys of batch size 2 and cannot take keys of batch size 1"),
        (lambda k: k.repeat(2, 1, 1, 1), "batch size 2 and .* batch size 4"),
        (lambda k: k[:, :1], "heads 2 and .* heads 1"),
        (lambda k: k[..., :8], "head_dim 16 and .* head_dim 8"),
        (lambda k: k.bfloat16(), "dtype torch.float32 and .* dtype torch.bfloat16"),
        (lambda k: k.to("meta"), "device cpu and .* device meta"),
    ],
)
@pytest.mark.parametrize("spec", STRATEGIES)
def test_tokens_of_another_batch_model_or_dtype_change_nothing(spec, change, said):
    """One row was spread over all, another dtype was rounded, without a word."""
    layer = kvplug.build(spec, tiny_llama().config, max_cache_len=64).layers[0]
    k = normal(2, 2, 30, 16, seed=0)
    layer.update(k, k)
    keys, values = layer.keys.clone(), layer.values.clone()
    one = change(normal(2, 2, 1, 16, seed=1))
    with pytest.raises(kvplug.Mismatch, match=f"this cache holds {said}|{said}"):
        layer.update(one, one)
    assert int(layer.get_seq_length()) == 30
    assert torch.equal(layer.keys, keys)
    assert torch.equal(layer.values, values)


def test_a_cache_of_another_number_of_layers():
    small, large = tiny_llama(num_hidden_layers=1), tiny_llama(num_hidden_layers=3)
    for model, other in ((small, large), (large, small)):
        cache = kvplug.build("int8", other.config)
        n, m = other.config.num_hidden_layers, model.config.num_hidden_layers
        with pytest.raises(kvplug.Mismatch, match=f"has {n} layers and LlamaConfig has {m}"):
            model.generate(prompt(5), **cache_argument(cache), max_new_tokens=2)
        assert cache.get_seq_length() == 0
    with pytest.raises(kvplug.Mismatch, match="has 1 layers and the model asks for number 2"):
        large(prompt(5), **cache_argument(kvplug.build("int8", small.config)))


@pytest.mark.parametrize("spec", STRATEGIES)
def test_float64_models(spec):
    """What loses nothing agrees with `DynamicCache` far beyond float32; `numba` says it cannot."""
    model, ids = tiny_llama().double(), prompt(18, 2)
    caches = [kvplug.build(spec, model.config, max_cache_len=64), DynamicCache(config=model.config)]
    with torch.no_grad():
        for part in ids.split([13, 1, 1, 2, 1], dim=1):
            a, b = (model(part, **cache_argument(c)).logits for c in caches)
            assert a.dtype == torch.float64
            if caches[0].strategy.lossless:
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-10)
            assert (a - b).abs().max() < 0.5 * b.abs().max()
    with pytest.raises(kvplug.SpecError, match=r"'numba' reads float32, .* not torch.float64"):
        model(ids, **cache_argument(kvplug.build("int8+numba", model.config)))


@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
def test_compression_goes_on_after_assisted_decoding(how):
    """Recording the past stayed on in the cache that came back: nothing was encoded any more."""
    model, ids = tiny_llama(), prompt(8).repeat(1, 4)
    kwargs = (
        {"prompt_lookup_num_tokens": 3}
        if how == "prompt lookup"
        else {"assistant_model": tiny_llama(num_hidden_layers=1)}
    )
    new = {"do_sample": False, "max_new_tokens": 10}
    held = []
    for own in (kwargs, {}):
        cache = kvplug.build("sinks(sinks=2, window=150)+int4(block=8, tail=8)", model.config)
        out = model.generate(ids, **cache_argument(cache), **new, **own)
        ends = prompt(5, seed=3)
        out = model.generate(
            torch.cat((out, ends), 1), **cache_argument(cache), **new | {"max_new_tokens": 210}
        )
        for layer in cache.layers:
            assert len(layer.tail) <= 8 + 8 - 1
        held.append(cache.nbytes())
    assert held[0] <= 1.1 * held[1]


@pytest.mark.parametrize(
    "spec", ["int4(block=8, tail=8)", "window(length=20)", "exact(block=8)+host"]
)
def test_recording_ends_when_told_and_with_reset(spec):
    def layer():
        return kvplug.build(spec, tiny_llama().config).layers[0]

    def feed(layer):
        for i in range(40):
            layer.update(*(normal(1, 2, 5, 16, seed=2 * i + s) for s in (0, 1)))

    told, reset, plain = layer(), layer(), layer()
    told.activate_past_recording()
    reset.activate_past_recording()
    feed(told)
    assert len(told.tail) == 200
    told.deactivate_past_recording()
    reset.reset()
    for x in (reset, plain):
        feed(x)
    for x in (told, reset):
        plain.settle()
        x.settle()
        assert len(x.tail) == len(plain.tail) < 30
        assert torch.equal(x.keys, plain.keys)
