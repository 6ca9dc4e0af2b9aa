"""Hosts we do not know: what is missing is said, objects and transformers' own go on."""

import inspect
import warnings

import pytest
import torch
import transformers
from fresh import fresh
from greedy import GREEDY
from transformers import GenerationConfig
from transformers.generation.utils import GenerationMixin

import kvplug
from kvplug import compat
from kvplug.compat import cache_argument
from kvplug.testing import tiny_llama
from kvplug.testing.tools import prompt

pytestmark = pytest.mark.canary


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
