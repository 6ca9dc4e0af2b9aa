"""Names in `generate`: ours are accepted everywhere, everything else is as it was."""

import copy
import inspect
import threading

import pytest
import torch
import transformers
from fresh import fresh
from greedy import GREEDY
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation.utils import GenerationMixin

import kvplug
from kvplug import compat
from kvplug.compat import cache_argument, output_cache
from kvplug.testing import tiny_llama

pytestmark = pytest.mark.canary


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


def test_a_name_without_a_cache_to_be_is_an_error(model, ids):
    with pytest.raises(kvplug.SpecError, match=r"'int4' cannot apply: use_cache is False"):
        model.generate(ids, use_cache=False, cache_implementation="int4", **GREEDY)


def test_name_and_object_together_is_an_error_as_in_transformers(model, ids):
    for cache in (DynamicCache(), kvplug.build("int8", model.config)):
        with pytest.raises(ValueError, match=r"Passing both `cache_implementation`.*unsupported"):
            model.generate(ids, cache_implementation="int4", **cache_argument(cache), **GREEDY)


def test_unregister_restores_the_very_attributes():
    code = (
        "from transformers import GenerationConfig as C\n"
        "from transformers.generation.utils import GenerationMixin as M\n"
        "methods = ((C, 'validate'), (M, '_prepare_generation_config'),\n"
        "           (M, '_prepare_cache_for_generation'), (M, '_assisted_decoding'))\n"
        "look = lambda: [c.__dict__[name] for c, name in methods]\n"
        "before = look()\n"
        "names = set(C.__dict__), set(M.__dict__)\n"
        "import kvplug\n"
        "during = look()\n"
        "assert not any(a is b for a, b in zip(before, during))\n"
        "kvplug.register(); kvplug.register()\n"
        "assert all(a is b for a, b in zip(look(), during))\n"
        "kvplug.unregister(); kvplug.unregister()\n"
        "assert all(a is b for a, b in zip(look(), before))\n"
        "assert names == (set(C.__dict__), set(M.__dict__))\n"
        "import importlib; importlib.reload(kvplug); kvplug.unregister()\n"
        "assert C.__dict__['validate'] is before[0]\n"
    )
    fresh(code)


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
        "    ('GenerationMixin', '_assisted_decoding'), ('GenerationMixin', '_prefill'),\n"
        "    ('GenerationMixin', '_prepare_cache_for_generation'),\n"
        "    ('GenerationMixin', '_prepare_generation_config')], changed\n"
    )
    fresh(code)


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


def test_wrapped_methods_look_like_transformers_own():
    """Tools that ask for a signature, and transformers' own checks of arguments, see no change."""
    methods = [
        (GenerationConfig, "validate"),
        (GenerationMixin, compat.PREPARE_CONFIG),
        (GenerationMixin, compat.PREPARE_CACHE),
        (GenerationMixin, "_assisted_decoding"),
    ]

    def look():
        found = [getattr(owner, name) for owner, name in methods]
        return found, [
            (inspect.signature(x), x.__name__, x.__qualname__, x.__module__, x.__doc__)
            for x in found
        ]

    ours, looks = look()
    kvplug.unregister()
    try:
        theirs, expected = look()
    finally:
        kvplug.register()
    assert not any(a is b for a, b in zip(ours, theirs, strict=True))
    assert looks == expected


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
