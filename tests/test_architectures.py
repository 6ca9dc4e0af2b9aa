"""Tiny random models of many kinds: equal tokens where nothing is lost, layers as promised."""

import copy
import inspect
import pickle
from importlib import import_module
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import transformers
from greedy import GREEDY
from transformers.masking_utils import create_chunked_causal_mask

import kvplug
from kvplug.cache import _storages
from kvplug.compat import (
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
    cache_argument,
)
from kvplug.layers.combined import with_state
from kvplug.layers.growing import Layer
from kvplug.layers.static import StaticLayer as OurStaticLayer
from kvplug.layers.static_coded import StaticCodedLayer
from kvplug.layers.static_sliding import StaticSlidingLayer
from kvplug.testing.architectures import make
from kvplug.testing.tools import assert_close, left_padded, prompt

pytestmark = pytest.mark.canary

KINDS = [
    "llama", "mistral, sliding", "qwen2, key bias", "qwen3", "gemma2, sliding and softcap",
    "gemma3, sliding", "gpt2", "gpt_neox, partial rotary", "cohere, interleaved", "phi",
    "falcon, multi-query", "falcon, alibi", "mixtral", "gpt_oss, sliding and attention sinks",
    "deepseek_v3", "lfm2, conv hybrid", "qwen3_next, linear hybrid",
    "falcon_h1, mamba in each layer", "zamba2, mamba", "jamba, mamba", "llama4, chunked",
    "gemma3n, shared keys and values", "bloom, alibi", "mpt, alibi", "opt", "olmo2", "granite",
    "stablelm", "starcoder2", "smollm3, no rotation in a layer",
]  # fmt: skip

# up to 5.17 `generate` hands this an argument it does not take, for any static cache
OLD_CHUNKED_MASK = (
    "block_sequence_ids" not in inspect.signature(create_chunked_causal_mask).parameters
)
LOSSLESS = ["growing", "static", "exact(block=8)+host", "exact(block=8)+disk", "window(length=100)"]
LOSSY = ["int8(block=8)", "static+int8(block=8)", "int4(block=8, tail=8)+disk"]


def refuses(model, spec):
    """Whether the model cannot have a strategy; then that is said before the model runs."""
    config = model.config
    theirs = transformers.DynamicCache(config=config).layers
    old_bloom = config.model_type == "bloom" and not hasattr(
        transformers.models.bloom.modeling_bloom, "_get_alibi_slopes"
    )
    static = spec.startswith("static")
    if static and "+int" in spec and all(getattr(x, "is_sliding", False) for x in theirs):
        match = r"could serve.*DynamicSlidingWindowLayer"
    elif (static or "window" in spec or "sinks" in spec) and (
        old_bloom or getattr(config, "alibi", False)
    ):
        match = r"alibi bias of (Bloom|Falcon)Config.*use full\+growing"
    else:
        return False
    with pytest.raises(kvplug.SpecError, match=match):
        kvplug.build(spec, config, max_cache_len=64)
    return True


def run(model, inputs, spec=None, **kwargs):
    if spec is not None:
        spec = f"kvplug:{spec}"
    return model.generate(**inputs, cache_implementation=spec, **(GREEDY | kwargs))


@pytest.fixture(params=KINDS)
def model(request):
    return make(request.param)


@pytest.fixture(params=KINDS)
def model_and_turn(request):
    """A model, and which of two: what is tried with half of the models each."""
    return make(request.param), list(KINDS).index(request.param) % 2


@pytest.mark.parametrize("batch", ["one", "padded"])
def test_lossless_strategies_give_the_tokens_of_dynamic_cache(model_and_turn, batch):
    """Each strategy on each model, in one of two batches, in turn."""
    model, turn = model_and_turn
    inputs = {"input_ids": prompt(13)}
    if batch == "padded":
        inputs = left_padded([prompt(n, seed=n)[0] for n in (19, 6)])
    plain = run(model, inputs)
    for spec in LOSSLESS[turn ^ (batch == "padded") :: 2]:
        if refuses(model, spec):
            continue
        if model.config.model_type == "bloom" and batch == "padded" and "window" in spec:
            with pytest.raises(kvplug.SpecError, match=r"alibi.*for rows of unlike length use"):
                run(model, inputs, spec)
            continue
        if spec == "static" and model.config.model_type == "llama4_text" and OLD_CHUNKED_MASK:
            with pytest.raises(TypeError, match="block_sequence_ids"):  # theirs fails alike
                model.generate(**inputs, cache_implementation="static", **GREEDY)
            continue
        assert torch.equal(run(model, inputs, spec), plain), spec


def test_lossy_strategies_are_near(model):
    """The first logits are exact, later ones near on average; nothing that is not finite."""
    ids = prompt(29)
    exact = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        steps = [
            model(x, **cache_argument(exact)).logits for x in (ids, *prompt(9, seed=1).split(1, 1))
        ]
        for spec in LOSSY:
            if refuses(model, spec):
                continue
            cache, errors = kvplug.build(spec, model.config, max_cache_len=64), []
            for i, x in enumerate((ids, *prompt(9, seed=1).split(1, 1))):
                logits = model(x, **cache_argument(cache)).logits
                assert logits.isfinite().all()
                errors.append(float((logits - steps[i]).abs().mean() / steps[i].abs().mean()))
            assert errors[0] < 1e-4, spec
            assert sum(errors[1:]) / 9 < (0.6 if "int4" in spec else 0.05), (spec, errors)


def test_layers_are_as_promised(model):
    theirs = transformers.DynamicCache(config=model.config).layers
    plain = (DynamicLayer, LinearAttentionAndFullAttentionLayer)
    for spec in ("growing", "int8(block=8)", "sinks(sinks=2, window=20)+int8(block=8)"):
        if refuses(model, spec):
            continue
        ours = kvplug.build(spec, model.config).layers
        for a, b in zip(ours, theirs, strict=True):
            if type(b) in plain:
                assert type(a) is (Layer if type(b) is DynamicLayer else with_state(Layer))
                assert not a.is_sliding
                assert a.strategy == kvplug.parse(spec)
            elif getattr(b, "is_sliding", False):
                assert type(a) is Layer
                assert a.is_sliding
                assert a.strategy.retention.length == b.sliding_window
                assert a.strategy.codec == kvplug.parse(spec).codec
            else:
                assert type(a) is type(b)
    for spec, kind in (("static", OurStaticLayer), ("static+int8", StaticCodedLayer)):
        if refuses(model, spec):
            continue
        ours = kvplug.build(spec, model.config, max_cache_len=32).layers
        for a, b in zip(ours, theirs, strict=True):
            assert isinstance(a, kind) == (type(b) in plain)
            assert isinstance(a, LinearAttentionLayer) == isinstance(b, LinearAttentionLayer)
            assert isinstance(a, StaticSlidingLayer) == getattr(b, "is_sliding", False)


@pytest.mark.parametrize(
    "name", ["mistral, sliding", "gemma3, sliding", "gpt_oss, sliding and attention sinks"]
)
@pytest.mark.parametrize(
    "spec", ["growing", "static", "exact(block=4)+host", "exact(block=4)+disk"]
)
def test_native_windows_stay_right_over_all_ways_to_generate(name, spec):
    model = make(name)
    inputs = {"input_ids": prompt(8).repeat(1, 3)}
    for kwargs in (
        {},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 5},
    ):
        assert torch.equal(run(model, inputs, spec, **kwargs), run(model, inputs, **kwargs)), kwargs


COMBINED = ["falcon_h1, mamba in each layer", "zamba2, mamba"]


@pytest.mark.parametrize("name", COMBINED)
@pytest.mark.parametrize("spec", ["growing", "static", "exact(block=4)+host"])
def test_a_state_beside_attention_goes_through_all_that_a_cache_does(name, spec):
    """Beams, `reset`, rows repeated and chosen, a copy: as with transformers' own cache."""
    model, ids = make(name), prompt(13)
    inputs, beams = {"input_ids": ids}, {"num_beams": 3}
    assert torch.equal(run(model, inputs, spec, **beams), run(model, inputs, **beams))
    steps = prompt(3, batch=3, seed=1)

    def decode(cache, rows):
        return torch.cat(
            [model(x, **cache_argument(cache)).logits for x in steps[rows].split(1, 1)], dim=1
        )

    with torch.no_grad():
        expected = transformers.DynamicCache(config=model.config)
        model(ids.repeat(3, 1), **cache_argument(expected))
        expected = decode(expected, [0, 1, 2])
        cache = kvplug.build(spec, model.config, max_cache_len=32)
        for _ in range(2):
            model(ids.repeat(3, 1), **cache_argument(cache))
            assert_close(decode(cache, [0, 1, 2]), expected)
            cache.reset()
        if "zamba2" in name:  # transformers' layers of state alone do not repeat their rows
            return
        cache = kvplug.build(spec, model.config, max_cache_len=32)
        model(ids, **cache_argument(cache))
        cache.batch_repeat_interleave(3)
        twin = copy.deepcopy(cache)
        assert_close(decode(cache, [0, 1, 2]), expected)
        twin.batch_select_indices(torch.tensor([2, 0]))
        assert_close(decode(twin, [2, 0]), expected[[2, 0]])


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(lambda: transformers.MambaConfig(num_hidden_layers=2), id="mamba"),
        pytest.param(
            lambda: transformers.Mamba2Config(
                num_hidden_layers=2, hidden_size=64, num_heads=8, head_dim=16
            ),
            id="mamba2",
        ),
    ],
)
def test_models_without_attention_are_refused_by_name(config):
    with pytest.raises(
        kvplug.SpecError, match=r"no attention layer it could serve.*LinearAttentionLayer"
    ):
        kvplug.build("int4", config())


@pytest.mark.parametrize("name", ["bloom, alibi", "falcon, alibi"])
@pytest.mark.parametrize("spec", ["window(length=20)", "sinks(sinks=2, window=20)", "static+int8"])
def test_alibi_is_right_or_refused_before_the_model_runs(name, spec, monkeypatch):
    """A bias by distance with a column for each token of the mask fits no fewer keys."""
    model = make(name)
    padded = left_padded([prompt(n, seed=n)[0] for n in (19, 6)])
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(kvplug.SpecError, match=r"the alibi bias of \w+Config has a column for"):
        run(model, padded, spec)


@pytest.mark.parametrize("name", ["bloom, alibi", "mpt, alibi"])
@pytest.mark.parametrize(("spec", "sinks"), [("window(length=20)", 0), ("sinks(window=20)", 4)])
def test_alibi_counts_distances_inside_the_cache(name, spec, sinks):
    """One layer sees nothing but embeddings: the tokens kept are all that the logits depend on."""
    model, ids = (
        make(name, **{"bloom, alibi": {"n_layer": 1}, "mpt, alibi": {"n_layers": 1}}[name]),
        prompt(60),
    )
    if refuses(model, spec):
        return
    cache = kvplug.build(spec, model.config)
    with torch.no_grad():
        model(ids[:, :-1], **cache_argument(cache))
        logits = model(ids[:, -1:], **cache_argument(cache)).logits
        kept = torch.cat((ids[:, :sinks], ids[:, -20:]), dim=1)
        assert_close(logits, model(kept, use_cache=False).logits[:, -1:])


@pytest.mark.parametrize("name", ["mistral, sliding", "gemma3, sliding"])
def test_windows_of_a_static_cache_roll_back(name):
    """`crop` gives back what has left the window while recorded, and says what it cannot."""
    model, ids = make(name), prompt(40)
    cache, fresh = (kvplug.build("static", model.config, max_cache_len=60) for _ in range(2))
    with torch.no_grad():
        model(ids[:, :20], **cache_argument(cache))
        with pytest.raises(kvplug.Evicted, match=r"cannot crop 3 of 20 tokens"):
            cache.layers[0].crop(-3)
        cache.activate_past_recording()
        for begin, end in ((20, 24), (24, 25), (25, 31)):
            model(ids[:, begin:end], **cache_argument(cache))
        cache.crop(-8)
        model(ids[:, :23], **cache_argument(fresh))
        for a, b in zip(cache.layers, fresh.layers, strict=True):
            assert int(a.get_seq_length()) == int(b.get_seq_length()) == 23
            assert_close(a.keys[:, :, : a.held()], b.keys[:, :, : b.held()])
        for x in (ids[:, 23:24], ids[:, 24:28]):
            logits = [model(x, **cache_argument(c)).logits for c in (cache, fresh)]
            assert_close(*logits)


def test_a_window_longer_than_a_static_cache_does_not_slide():
    """With no layer of full attention nothing else says that the room is used up."""
    model = make("mistral, sliding", sliding_window=40)
    cache = kvplug.build("static", model.config, max_cache_len=16)
    with torch.no_grad():
        model(prompt(16), **cache_argument(cache))
        with pytest.raises(kvplug.CacheOverflow, match=r"max_cache_len=16 holds 16 tokens"):
            model(prompt(1), **cache_argument(cache))


@pytest.mark.parametrize("spec", ["static", "static+int8", "static+window(length=9)"])
def test_a_static_cache_says_before_the_model_runs_how_long_it_should_be(spec, monkeypatch):
    model, ids = make("llama"), prompt(13)
    cache = kvplug.build(spec, model.config, max_cache_len=20)
    ids = model.generate(ids, **(GREEDY | {"max_new_tokens": 5}), **cache_argument(cache))
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(
        kvplug.CacheOverflow, match=r"holds 17 tokens.*build it with max_cache_len >= 29"
    ):
        model.generate(ids, **GREEDY, **cache_argument(cache))


def test_attention_that_compiles_itself_gets_dense_tensors_or_is_refused():
    model, ids = make("llama", max_position_embeddings=2048), prompt(1100)
    model.set_attn_implementation("flex_attention")
    for spec in ("int8", "host", "window+int4+disk"):
        with pytest.raises(kvplug.SpecError, match=r"flex_attention.*choose 'sdpa'"):
            run(model, {"input_ids": ids}, spec)
    cache = kvplug.build("growing", model.config)
    for x in (ids, ids[:, :1]):  # at this length the CPU kernel would read a view
        with torch.no_grad():
            given = cache.update(*torch.zeros(2, 1, 2, x.shape[1], 16), 0)
        assert all(type(x) is torch.Tensor for x in given)


@pytest.mark.parametrize(
    "spec", ["int4(block=8, tail=0)", "snapkv(budget=16, every=5, window=4)+int8(block=8)+host"]
)
def test_a_compiled_model_leaves_what_is_stored_to_the_kernel(spec):
    """Compiled graphs end where the cache begins: views are read, never traced nor made dense."""
    model = make("llama", num_hidden_layers=1)
    ours, eager = (kvplug.build(spec, model.config) for _ in range(2))
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=False):
        compiled = torch.compile(model, backend="eager")
        for i, S in enumerate((20, 1, 1)):
            x = prompt(S, seed=i)
            got = compiled(x, **cache_argument(ours)).logits
            assert_close(got, model(x, **cache_argument(eager)).logits)
    torch._dynamo.reset()
    assert ours.stats() == eager.stats()
    assert not ours.stats()["materialised"]


@pytest.mark.parametrize("spec", ["growing", "static", "int8(block=8)", "static+int8(block=8)"])
def test_a_cache_sent_to_another_process_is_a_copy(spec):
    """torch shares the memory of what it sends; both sides go on for themselves."""
    model = make("llama")
    cache, alone = (kvplug.build(spec, model.config, max_cache_len=32) for _ in range(2))
    with torch.no_grad():
        for each in (cache, alone):
            model(prompt(13), **cache_argument(each))
        sent = pickle.loads(ForkingPickler.dumps(cache))
        first, other = prompt(1, seed=1), prompt(1, seed=2)
        logits = model(first, **cache_argument(cache)).logits
        model(other, **cache_argument(sent))
        assert torch.equal(logits, model(first, **cache_argument(alone)).logits)
        for a, b in zip(cache.layers, alone.layers, strict=True):
            assert torch.equal(a.keys, b.keys)
    assert not set(_storages(cache)) & set(_storages(sent))


def test_a_layer_of_an_unknown_kind_is_an_error(monkeypatch):
    """What a later transformers, or a model's own code, may bring beside the layers we know."""

    class NewLayer(DynamicLayer):
        pass

    known = transformers.DynamicCache.__init__

    def init(self, *args, **kwargs):
        known(self, *args, **kwargs)
        self.layers[1:2] = [NewLayer()]

    config = transformers.LlamaConfig(num_hidden_layers=3)
    monkeypatch.setattr(transformers.DynamicCache, "__init__", init)
    with pytest.raises(kvplug.SpecError, match=r"int8: LlamaConfig.*does not know: NewLayer"):
        kvplug.build("int8", config)


def test_a_real_layer_of_its_own_kind():
    """DeepSeek-V4 keeps compressed keys beside a window."""
    if not hasattr(transformers, "DeepseekV4Config"):
        pytest.skip("this transformers has no DeepSeek-V4")
    import_module("transformers.models.deepseek_v4.modeling_deepseek_v4")  # makes them known
    with pytest.raises(kvplug.SpecError, match=r"DeepseekV4Config.*does not know: DeepseekV4"):
        kvplug.build("int8", transformers.DeepseekV4Config(num_hidden_layers=4))
