"""Names in `generate`: ours are accepted everywhere, everything else is as it was."""

import copy
import inspect
import threading
import warnings

import pytest
import torch
import transformers
from fresh import fresh
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation.candidate_generator import AssistedCandidateGenerator
from transformers.generation.utils import GenerationMixin

import kvplug
from kvplug import compat
from kvplug.compat import cache_argument, output_cache
from kvplug.testing import tiny_llama
from kvplug.testing.tools import prompt, random_model

pytestmark = pytest.mark.canary

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
        "    ('GenerationMixin', '_assisted_decoding'),\n"
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


# ---------------------------------------------------------------------------- hosts we do not know


def without_prepare(patch):
    patch.delattr(GenerationMixin, "_prepare_cache_for_generation")


def other_parameters(patch):
    def prepare(self, config, inputs):
        """As a later version may have it."""

    patch.setattr(GenerationMixin, "_prepare_cache_for_generation", prepare)


def other_outputs(patch):
    patch.delattr(transformers.generation.utils, "GenerateDecoderOnlyOutput")


def other_fields(patch):
    init = GenerationConfig.__init__

    def without(self, **kwargs):
        init(self, **kwargs)
        del self.is_assistant

    patch.setattr(GenerationConfig, "__init__", without)


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (without_prepare, "no GenerationMixin._prepare_cache_for_generation"),
        (other_parameters, "no argument 'generation_config' of GenerationMixin._prepare_cache"),
        (other_outputs, "no the cache in GenerateDecoderOnlyOutput"),
        (other_fields, "no GenerationConfig.is_assistant"),
    ],
)
def test_a_host_without_what_names_need(change, missing, model, ids, monkeypatch):
    kvplug.unregister()
    before = dict(vars(GenerationMixin))
    try:
        with monkeypatch.context() as patch:
            change(patch)
            kvplug.register()
            for call in (
                lambda: model.generate(ids, cache_implementation="int4", **GREEDY),
                lambda: model.generate(ids, GenerationConfig(cache_implementation="kvplug:static")),
            ):
                with pytest.raises(kvplug.UnknownHost) as e:
                    call()
                for part in (missing, "5.17.0, 5.23.0, 5.24.0", "pip install", "kvplug.build("):
                    assert part in str(e.value)
            with torch.no_grad():
                logits = model(ids, **cache_argument(kvplug.build("growing", model.config))).logits
                assert torch.equal(logits, model(ids).logits)
            kvplug.unregister()
    finally:
        kvplug.unregister()
        assert dict(vars(GenerationMixin)) == before
        kvplug.register()
    assert model.generate(ids, cache_implementation="int4", **GREEDY).shape == (1, 33)


def test_import_and_objects_where_every_private_name_is_gone():
    code = (
        "import torch, transformers\n"
        "from transformers.generation import configuration_utils, utils\n"
        "del configuration_utils.ALL_CACHE_IMPLEMENTATIONS\n"
        "del utils.GenerateDecoderOnlyOutput\n"
        "for name in ('_prepare_cache_for_generation', '_prepare_generation_config'):\n"
        "    delattr(utils.GenerationMixin, name)\n"
        "del transformers.GenerationConfig.validate\n"
        "transformers.GenerationConfig.validate = lambda self, **_: None\n"
        "import kvplug\n"
        "from kvplug.testing import tiny_llama\n"
        "from kvplug.testing.tools import prompt\n"
        "model, ids = tiny_llama(), prompt(9)\n"
        "with torch.no_grad():\n"
        "    expected = model(ids).logits\n"
        "    for name in ('past_key_values', 'cache'):\n"
        "        cache = kvplug.build('growing', model.config)\n"
        "        model(ids, **{name: cache})\n"
        "        if cache.get_seq_length():\n"
        "            break\n"
        "assert cache.get_seq_length() == 9\n"
        "config = transformers.GenerationConfig\n"
        "for call in (lambda: model.generate(ids, cache_implementation='int4'),\n"
        "             lambda: config(cache_implementation='int4').validate()):\n"
        "    try:\n"
        "        call()\n"
        "    except kvplug.UnknownHost as e:\n"
        "        assert 'ALL_CACHE_IMPLEMENTATIONS' in str(e) and '5.24.0' in str(e)\n"
        "    else:\n"
        "        raise AssertionError('accepted')\n"
        "config(cache_implementation='static').validate()\n"
    )
    fresh(code)


def test_the_host_that_is_installed_is_known():
    assert compat.problems() == []
    assert (
        compat.CACHE_ARGUMENT in inspect.signature(transformers.LlamaForCausalLM.forward).parameters
    )
    made = transformers.DynamicCache(config=tiny_llama().config).layers
    assert type(made[0]) is compat.DynamicLayer


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_padding_is_told_whatever_the_argument_is_called(model, name):
    """The first tokens that sinks pin are those of the text, not of the padding before it."""
    if name == "cache" != compat.CACHE_ARGUMENT:
        pytest.skip("this transformers has no such argument")
    spec = "sinks(sinks=2, window=6)"
    ids = torch.cat((torch.zeros(1, 7, dtype=torch.long), prompt(15)), dim=1)
    mask = (torch.arange(22) >= 7).long()[None]
    expected = model.generate(ids, attention_mask=mask, cache_implementation=spec, **GREEDY)
    cache = kvplug.build(spec, model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, for the older name
        out = model.generate(ids, attention_mask=mask, **{name: cache}, **GREEDY)
    assert cache.layers[0].padding.tolist() == [7]
    assert torch.equal(out, expected)
    unpadded = model.generate(ids[:, 7:], cache_implementation=spec, **GREEDY)
    assert torch.equal(out[:, 7:], unpadded)


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


class OwnCache(transformers.LlamaForCausalLM):
    """Prepares its cache itself, as Parakeet's and VibeVoice's classes do."""

    def _prepare_cache_for_generation(self, config, kwargs, *_):
        if config.use_cache is not False:
            kwargs.update(cache_argument(DynamicCache(config=self.config)))


class CallsOn(transformers.LlamaForCausalLM):
    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


class Inherits(OwnCache):
    """Overridden twice: what counts is where it ends."""

    def _prepare_cache_for_generation(self, *args, **kwargs):
        super()._prepare_cache_for_generation(*args, **kwargs)


@pytest.mark.parametrize("kind", [OwnCache, Inherits])
def test_a_model_that_does_not_take_our_cache_is_an_error(kind, model, ids, monkeypatch):
    theirs = kind(model.config).eval()
    theirs.load_state_dict(model.state_dict())
    plain = model.generate(ids, **GREEDY)
    before = vars(kind)["_prepare_cache_for_generation"]
    assert torch.equal(theirs.generate(ids, **GREEDY), plain)
    assert vars(kind)["_prepare_cache_for_generation"] is before, "watched only when it matters"
    with monkeypatch.context() as patch:
        patch.setattr(theirs, "forward", lambda *_, **__: pytest.fail("the model ran"))
        for _ in range(2):
            with pytest.raises(kvplug.SpecError, match=rf"{kind.__name__}.*own kind.*'int4'"):
                theirs.generate(ids, cache_implementation="int4", **GREEDY)
    assert torch.equal(theirs.generate(ids, **GREEDY), plain)
    kvplug.unregister()
    try:
        assert vars(kind)["_prepare_cache_for_generation"] is before
    finally:
        kvplug.register()


def test_a_model_that_prepares_more_and_calls_on(model, ids):
    theirs = CallsOn(model.config).eval()
    theirs.load_state_dict(model.state_dict())
    for _ in range(2):
        out = theirs.generate(
            ids, cache_implementation="growing", return_dict_in_generate=True, **GREEDY
        )
        assert isinstance(output_cache(out), kvplug.Cache)
        assert torch.equal(out.sequences, model.generate(ids, **GREEDY))


def test_a_real_model_with_a_cache_of_its_own_kind():
    """Parakeet's transducer: transformers encodes the audio first, no token is decoded."""
    config = transformers.ParakeetRNNTConfig(
        vocab_size=33,
        blank_token_id=32,
        decoder_hidden_size=16,
        encoder_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "subsampling_conv_channels": 8,
            "num_mel_bins": 16,
        },
    )
    model = transformers.ParakeetForRNNT(config).eval()
    model.generation_config.decoder_start_token_id = 32
    with pytest.raises(kvplug.SpecError, match=r"ParakeetForRNNT.*own kind.*'int4'"):
        model.generate(
            input_features=torch.randn(1, 64, 16), cache_implementation="int4", max_new_tokens=4
        )


def inherits_the_targets_name():
    """Whether transformers gives an assistant the target's `cache_implementation`: up to 5.23."""
    target = GenerationConfig(cache_implementation="int8")
    target.eos_token_id = None
    made = AssistedCandidateGenerator(prompt(3), tiny_llama(), target, {})
    return made.generation_config.cache_implementation is not None


@pytest.mark.parametrize("spec", ["growing", "kvplug:static", "exact(block=8)+host"])
def test_what_an_assistant_caches_with(model, ids, spec):
    """The target's strategy or, on newer hosts, transformers' own; or what its own config says."""
    assistant = tiny_llama(num_hidden_layers=1)
    caches = {}
    for name, x in (("target", model), ("assistant", assistant)):
        x.register_forward_hook(
            lambda module, given, out, name=name: caches.setdefault(name, []).append(
                output_cache(out)
            )
        )
    plain = model.generate(ids, assistant_model=assistant, **GREEDY)
    assert {type(x) for x in caches["target"] + caches["assistant"]} == {DynamicCache}
    assert torch.equal(plain, model.generate(ids, **GREEDY))

    caches.clear()
    ours = model.generate(ids, assistant_model=assistant, cache_implementation=spec, **GREEDY)
    assert torch.equal(ours, plain)
    assert {type(x) for x in caches["target"]} == {kvplug.Cache}
    expected = kvplug.Cache if inherits_the_targets_name() else DynamicCache
    assert {type(x) for x in caches["assistant"]} == {expected}

    caches.clear()
    assistant.generation_config.cache_implementation = "int8(block=8)"
    ours = model.generate(ids, assistant_model=assistant, **GREEDY)
    assert torch.equal(ours, plain)
    assert {type(x) for x in caches["target"]} == {DynamicCache}
    assert {x.strategy.codec.name for x in caches["assistant"]} == {"int8"}


@pytest.mark.parametrize("spec", ["static+int8(block=8)", "static+int4(block=8, tail=8)"])
def test_static_codes_wait_for_the_verification(model, spec):
    """What is guessed is encoded once it is accepted, as layers that grow do: the same tokens."""
    ids = prompt(8).repeat(1, 4)
    growing = spec.removeprefix("static+")
    for guesses in ({"prompt_lookup_num_tokens": 10}, {"assistant_model": tiny_llama()}):
        expected, out = (
            model.generate(
                ids,
                cache_implementation=f"{name}+reference",
                return_dict_in_generate=True,
                **(GREEDY | {"max_new_tokens": 40}),
                **guesses,
            )
            for name in (growing, spec)
        )
        assert torch.equal(out.sequences, expected.sequences)
        assert output_cache(out).strategy.layout.name == "static"
        a, b = (output_cache(x).stats()["blocks_encoded"] for x in (expected, out))
        assert a == b > 0


def test_prompt_lookup_may_guess_beyond_the_last_token(model):
    """A static cache has room for guesses that are then thrown away."""
    ids = prompt(8).repeat(1, 4)
    for n in (3, 10):
        plain = model.generate(ids, prompt_lookup_num_tokens=n, **GREEDY)
        ours = model.generate(
            ids, prompt_lookup_num_tokens=n, cache_implementation="kvplug:static", **GREEDY
        )
        assert torch.equal(ours, plain)
