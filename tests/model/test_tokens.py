"""Lossless strategies give the tokens of DynamicCache on the real model.

`KVPLUG_MODEL_TOKENS=300` runs the long version.
"""

import os

import pytest
import torch

import kvplug
from kvplug.compat import output_cache

NEW = int(os.environ.get("KVPLUG_MODEL_TOKENS", "12"))
# blocks so small that these tokens fill some
LOSSLESS = ["growing", "kvplug:static", "exact(block=8)+host", "exact(block=8)+disk"]
DECODING = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 20},
    "prompt_lookup": {"prompt_lookup_num_tokens": 4},
    "assisted": {"assistant_model": True},
}


def generate(real, inputs, **options):
    model, tokenizer = real
    if options.get("assistant_model"):
        options["assistant_model"] = model
    torch.manual_seed(0)
    out = model.generate(
        **inputs,
        **{"max_new_tokens": NEW, "do_sample": False} | options,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        return_dict_in_generate=True,
    )
    return out.sequences, output_cache(out)


def single(prompts, row):
    real_tokens = prompts["attention_mask"][row].bool()
    return {name: x[row : row + 1, real_tokens] for name, x in prompts.items()}


@pytest.fixture(scope="module")
def exact(real, prompts):
    """DynamicCache's greedy tokens of the padded batch."""
    return generate(real, prompts)[0]


@pytest.mark.parametrize("spec", LOSSLESS)
def test_greedy_tokens_equal_dynamic_in_a_padded_batch(real, prompts, exact, spec):
    sequences, cache = generate(real, prompts, cache_implementation=spec)
    assert isinstance(cache, kvplug.Cache)
    assert torch.equal(sequences, exact)
    assert cache.stats()["materialised"] == {}


@pytest.mark.parametrize(("turn", "decoding"), list(enumerate(DECODING)))
def test_one_row_equals_dynamic_in_each_way_to_decode(real, prompts, turn, decoding):
    """Each with one of the strategies in turn; tiny models meet them all, in test_strategies."""
    options, spec = DECODING[decoding], LOSSLESS[turn % len(LOSSLESS)]
    inputs = single(prompts, turn % len(prompts["input_ids"]))
    reference, _ = generate(real, inputs, **options)
    sequences, cache = generate(real, inputs, cache_implementation=spec, **options)
    assert isinstance(cache, kvplug.Cache)
    assert torch.equal(sequences, reference)
    assert cache.stats()["materialised"] == {}
