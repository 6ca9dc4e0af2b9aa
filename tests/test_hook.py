"""Names in `generate`: ours are accepted everywhere, everything else is as it was."""

import copy
import functools
import subprocess
import sys
import threading

import pytest
import torch
import transformers
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation.utils import GenerationMixin

import kvplug
from kvplug.compat import cache_argument, output_cache
from kvplug.testing import tiny_llama
from kvplug.testing.tools import prompt, random_model

GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def ids():
    return prompt(21)


# ------------------------------------------------------------------------------ names and configs


@pytest.mark.parametrize(
    "name", ["int4", "kvplug:static", "sinks(sinks=2, window=9)+int8(block=8)+host", "growing"]
)
def test_generation_config_accepts_saves_and_loads(name, tmp_path, model, ids):
    config = GenerationConfig(cache_implementation=name, **GREEDY)
    config.validate()
    config.save_pretrained(tmp_path)
    loaded = GenerationConfig.from_pretrained(tmp_path)
    assert loaded.cache_implementation == name
    a, b = (model.generate(ids, generation_config=c) for c in (config, loaded))
    assert torch.equal(a, b)


def test_cache_config_saves_and_loads(tmp_path):
    config = GenerationConfig(cache_implementation="int4", cache_config={"group": 16, "tail": 128})
    config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).cache_config == {"group": 16, "tail": 128}


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"cache_implementation": "imt4"}, "unknown cache stage 'imt4'. Did you mean 'int4'?"),
        ({"cache_implementation": "int4+int8"}, "two stages of kind codec"),
        ({"cache_implementation": "int4(group=0)"}, "group must be at least 1"),
        (
            {"cache_implementation": "int4", "cache_config": {"grup": 3}},
            "Did you mean 'group'?",
        ),
        ({"cache_implementation": "kvplug:nothing"}, "unknown cache stage 'nothing'"),
    ],
)
def test_errors_come_before_the_model_runs(model, ids, kwargs, text, monkeypatch):
    def forward(*_, **__):
        raise AssertionError("the model ran")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(kvplug.SpecError) as e:
        model.generate(ids, **kwargs)
    assert text in str(e.value)
    with pytest.raises(ValueError) as e:
        GenerationConfig(**kwargs).validate()
    assert text in str(e.value)


def test_build_arguments_reach_the_cache(model, ids):
    out = model.generate(
        ids,
        cache_implementation="int4+host",
        cache_config={"group": 8, "tail": 16, "block": 8},
        return_dict_in_generate=True,
        **GREEDY,
    )
    expected = kvplug.parse("int4(group=8, tail=16, block=8)+host")
    assert output_cache(out).strategy == expected


def test_other_rules_of_the_config_still_hold():
    with pytest.raises(ValueError, match="num_return_sequences"):
        GenerationConfig(
            cache_implementation="int4", num_return_sequences=3, num_beams=2
        ).validate()


# --------------------------------------------------------------------------- calls not meant for us


@pytest.mark.parametrize("name", [None, "dynamic", "static", "offloaded"])
def test_transformers_own_names_keep_their_class(model, ids, name, monkeypatch):
    if name == "offloaded":
        monkeypatch.setattr(torch, "Stream", torch.Stream)  # constructed, never used without CUDA
    kvplug.unregister()
    try:
        plain = _try(model, ids, name)
    finally:
        kvplug.register()
    ours = _try(model, ids, name)
    assert type(ours) is type(plain)
    if isinstance(plain, Exception):
        assert str(ours) == str(plain)
        return
    assert type(output_cache(ours)) is type(output_cache(plain))
    assert not isinstance(output_cache(ours), kvplug.Cache)
    assert torch.equal(ours.sequences, plain.sequences)
    assert type(output_cache(ours)) is (StaticCache if name == "static" else DynamicCache)


def _try(model, ids, name):
    try:
        return model.generate(
            ids, cache_implementation=name, return_dict_in_generate=True, **GREEDY
        )
    except Exception as e:
        return e


def test_transformers_quantized_keeps_its_class(model, ids):
    pytest.importorskip("optimum.quanto")
    out = _try(model, ids, "quantized")
    if isinstance(out, Exception):
        pytest.skip(f"transformers' own: {out}")
    assert type(output_cache(out)) is transformers.QuantizedCache


def test_without_cache(model, ids):
    out = model.generate(ids, use_cache=False, **GREEDY)
    assert torch.equal(out, model.generate(ids, **GREEDY))


def test_name_and_object_together_is_an_error_as_in_transformers(model, ids):
    for cache in (DynamicCache(), kvplug.build("int8", model.config)):
        with pytest.raises(ValueError, match=r"Passing both `cache_implementation`.*unsupported"):
            model.generate(ids, cache_implementation="int4", **cache_argument(cache), **GREEDY)


def test_unregister_restores_the_very_attributes():
    code = (
        "from transformers import GenerationConfig as C\n"
        "from transformers.generation.utils import GenerationMixin as M\n"
        "before = C.__dict__['validate'], M.__dict__['_prepare_cache_for_generation']\n"
        "names = set(C.__dict__), set(M.__dict__)\n"
        "import kvplug\n"
        "during = C.__dict__['validate'], M.__dict__['_prepare_cache_for_generation']\n"
        "assert during[0] is not before[0] and during[1] is not before[1]\n"
        "kvplug.register(); kvplug.register()\n"
        "assert C.__dict__['validate'] is during[0]\n"
        "kvplug.unregister(); kvplug.unregister()\n"
        "after = C.__dict__['validate'], M.__dict__['_prepare_cache_for_generation']\n"
        "assert after[0] is before[0] and after[1] is before[1]\n"
        "assert names == (set(C.__dict__), set(M.__dict__))\n"
        "import importlib; importlib.reload(kvplug); kvplug.unregister()\n"
        "assert C.__dict__['validate'] is before[0]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_else_in_transformers_is_touched():
    code = (
        "import transformers, sys\n"
        "from transformers import cache_utils, masking_utils, DynamicCache\n"
        "from transformers.generation import utils, configuration_utils\n"
        "from transformers.integrations import sdpa_attention\n"
        "import torch\n"
        "modules = [m for n, m in sys.modules.items() if n.startswith('transformers.') and m]\n"
        "watched = [torch.nn.functional, *modules]\n"
        "before = [dict(vars(m)) for m in watched]\n"
        "classes = {c: dict(vars(c)) for b in before for c in b.values() if isinstance(c, type)}\n"
        "import kvplug\n"
        "changed = [(m.__name__, k) for m, b in zip(watched, before) for k, v in b.items()\n"
        "           if vars(m).get(k, None) is not v]\n"
        "assert not changed, changed\n"
        "changed = [(c.__name__, k) for c, b in classes.items() for k, v in vars(c).items()\n"
        "           if b.get(k, None) is not v and not k.startswith('__') and '_abc' not in k]\n"
        "assert sorted(changed) == [('GenerationConfig', 'validate'),\n"
        "    ('GenerationMixin', '_prepare_cache_for_generation')], changed\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]


def test_after_unregister_our_names_are_unknown(model, ids):
    kvplug.unregister()
    try:
        with pytest.raises(ValueError, match="cache_implementation"):
            model.generate(ids, cache_implementation="int4", **GREEDY)
        held = kvplug.build("growing", model.config)  # an object needs no name
        plain = model.generate(ids, **GREEDY)
        assert torch.equal(model.generate(ids, **cache_argument(held), **GREEDY), plain)
    finally:
        kvplug.register()
    assert model.generate(ids, cache_implementation="int4", **GREEDY).shape == (1, 33)


def test_wrapped_methods_keep_their_signature():
    for method in (GenerationConfig.validate, GenerationMixin._prepare_cache_for_generation):
        assert method.__wrapped__
        assert functools.WRAPPER_ASSIGNMENTS[0]
        assert method.__doc__ == method.__wrapped__.__doc__
        assert method.__name__ == method.__wrapped__.__name__


# --------------------------------------------------------------------------------- callers' objects


def test_the_callers_config_is_not_changed(model, ids):
    arguments = {"group": 8, "block": 8, "tail": 8}
    config = GenerationConfig(cache_implementation="int4", cache_config=arguments, **GREEDY)
    before = copy.deepcopy(config.to_dict())
    outs = [model.generate(ids, generation_config=config) for _ in range(2)]
    assert torch.equal(*outs)
    assert config.to_dict() == before
    assert arguments == {"group": 8, "block": 8, "tail": 8}
    assert model.generation_config.cache_implementation is None


def test_validate_changes_nothing():
    config = GenerationConfig(cache_implementation="static+int8", cache_config={"group": 8})
    before = copy.deepcopy(config.__dict__)
    config.validate()
    assert config.__dict__ == before


def test_a_models_own_default(model, ids):
    """`model.generation_config.cache_implementation` names ours for every call."""
    model.generation_config.cache_implementation = "int8(block=8)"
    out = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    assert output_cache(out).strategy.codec.name == "int8"
    assert model.generation_config.cache_implementation == "int8(block=8)"


def test_threads_models_and_configs_do_not_meet(ids):
    specs = ["int4(block=8, tail=0)", "window(length=9)", None, "static+int8(block=8)"]
    models = [tiny_llama(num_hidden_layers=n) for n in (1, 2, 1, 2)]

    def run(i):
        return models[i].generate(
            ids, cache_implementation=specs[i], return_dict_in_generate=True, **GREEDY
        )

    alone, together = [run(i) for i in range(4)], {}

    def work(i):
        for _ in range(3):
            together.setdefault(i, []).append(run(i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(4):
        assert len(together[i]) == 3
        for out in together[i]:
            assert torch.equal(out.sequences, alone[i].sequences)
            assert type(output_cache(out)) is type(output_cache(alone[i]))


# ---------------------------------------------------------------------------------- other entrances


def test_pipeline(model):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(97)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="w0", unk_token="w1"
    )
    tokenizer.padding_side = "left"
    text = " ".join(f"w{i}" for i in range(2, 30))
    plain = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    expected = plain(text, **GREEDY)
    for kwargs in ({"cache_implementation": "growing"}, {"generate_kwargs": None}):
        if "generate_kwargs" in kwargs:
            pipe = transformers.pipeline(
                "text-generation",
                model=model,
                tokenizer=tokenizer,
                cache_implementation="exact(block=8)+host",
            )
            assert pipe(text, **GREEDY) == expected
        else:
            assert plain(text, **GREEDY, **kwargs) == expected
    window = plain(text, cache_implementation="window(length=4)", **GREEDY)
    assert window != expected
    batch = plain([text, text[:20]], batch_size=2, cache_implementation="growing", **GREEDY)
    assert batch[0] == expected


@pytest.mark.parametrize(
    "spec", ["growing", "int8(block=8)", "exact(block=8)+host", "static+int8(block=8)"]
)
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoder(kind, spec):
    """Self-attention is ours; cross-attention stays transformers' and is filled once."""
    from transformers import AutoModelForSeq2SeqLM, BartConfig, T5Config

    config = {
        "t5": T5Config(
            vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
            decoder_start_token_id=1, eos_token_id=None, pad_token_id=0,
        ),
        "bart": BartConfig(
            vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
            decoder_ffn_dim=64, max_position_embeddings=128, init_std=0.3,
            decoder_start_token_id=1, eos_token_id=None, pad_token_id=0, forced_eos_token_id=None,
        ),
    }[kind]  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    model.generation_config = GenerationConfig(
        decoder_start_token_id=1, pad_token_id=0, bos_token_id=1
    )
    ids = prompt(15, 2)
    for extra in ({}, {"num_beams": 3}):
        kwargs = {"do_sample": False, "max_new_tokens": 20, "return_dict_in_generate": True} | extra
        plain = model.generate(ids, **kwargs)
        ours = model.generate(ids, cache_implementation=f"kvplug:{spec}", **kwargs)
        cache = output_cache(ours)
        assert isinstance(cache.self_attention_cache, kvplug.Cache)
        assert type(cache.cross_attention_cache) is DynamicCache
        assert cache.cross_attention_cache.get_seq_length() == 15
        assert int(cache.self_attention_cache.get_seq_length()) == 20
        if kvplug.parse(spec).codec.lossless:
            assert torch.equal(ours.sequences, plain.sequences)
        else:
            assert ours.sequences.shape == plain.sequences.shape


def test_models_that_build_their_own_cache_say_so():
    config = transformers.MambaConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = random_model(config)
    with pytest.raises(kvplug.SpecError, match=r"int4.*Mamba|Mamba.*int4|no attention layer"):
        model.generate(prompt(5), cache_implementation="int4", **GREEDY)
    assert model.generate(prompt(5), **GREEDY).shape == (1, 17)


def test_assistant_takes_the_strategy_too(model, ids):
    """The assistant inherits the target's config; its later rounds bring their own cache."""
    assistant = tiny_llama(num_hidden_layers=1)
    plain = model.generate(ids, assistant_model=assistant, **GREEDY)
    assert torch.equal(plain, model.generate(ids, **GREEDY))
    for spec in ("growing", "kvplug:static", "exact(block=8)+host"):
        ours = model.generate(ids, assistant_model=assistant, cache_implementation=spec, **GREEDY)
        assert torch.equal(ours, plain)


def test_prompt_lookup_may_guess_beyond_the_last_token(model):
    """A static cache has room for guesses that are then thrown away."""
    ids = prompt(8).repeat(1, 4)
    for n in (3, 10):
        plain = model.generate(ids, prompt_lookup_num_tokens=n, **GREEDY)
        ours = model.generate(
            ids, prompt_lookup_num_tokens=n, cache_implementation="kvplug:static", **GREEDY
        )
        assert torch.equal(ours, plain)
