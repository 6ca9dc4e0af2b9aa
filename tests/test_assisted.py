"""Assisted decoding: whose cache an assistant has, what is guessed and then thrown away."""

import pytest
import torch
from greedy import GREEDY
from transformers import DynamicCache, GenerationConfig
from transformers.generation.candidate_generator import AssistedCandidateGenerator

import kvplug
from kvplug.compat import output_cache
from kvplug.testing import tiny_llama
from kvplug.testing.tools import prompt

pytestmark = pytest.mark.canary


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
                **(GREEDY | {"max_new_tokens": 20}),
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
