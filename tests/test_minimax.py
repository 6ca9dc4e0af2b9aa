"""MiniMax's models, which take no cache but their own class: ours is one, and right."""

from __future__ import annotations

import copy
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

import kvplug
from kvplug.compat import MINIMAX, cache_argument, find, output_cache
from kvplug.testing.architectures import make
from kvplug.testing.tools import assert_close, left_padded, prompt, same


@pytest.fixture(scope="module")
def model():
    """A linear-attention layer, then a full one, as MiniMax-Text-01 begins."""
    return make("minimax, linear hybrid")


@pytest.mark.parametrize("spec", ["growing", "kvplug:static"])
@pytest.mark.parametrize("beams", [1, 3])
def test_padding_and_beams_are_as_without_a_cache(model, spec, beams):
    inputs = left_padded([prompt(21)[0], prompt(7, seed=1)[0]])
    settings = {"do_sample": False, "max_new_tokens": 8, "num_beams": beams}
    got = model.generate(
        **inputs, **settings, cache_implementation=spec, return_dict_in_generate=True
    )
    assert same(got.sequences, model.generate(**inputs, **settings, use_cache=False))
    assert type(output_cache(got)).__mro__[1] is kvplug.Cache


def test_its_states_are_copied_sent_and_written_with_it(model, tmp_path):
    """And each copy goes on as the cache itself."""
    cache = kvplug.build("int8(block=8)", model.config)
    with torch.no_grad():
        model(prompt(13), **cache_argument(cache))
        cache.save(tmp_path)
        others = [
            copy.deepcopy(cache),
            pickle.loads(ForkingPickler.dumps(cache)),
            kvplug.load(tmp_path, model),
        ]
        wanted = model(prompt(1, seed=1), **cache_argument(cache)).logits
        for other in others:
            assert isinstance(other, find(*MINIMAX))
            assert_close(model(prompt(1, seed=1), **cache_argument(other)).logits, wanted)


def test_what_a_state_cannot_undo_is_refused_by_transformers(model):
    with pytest.raises((ValueError, RuntimeError), match="crop"):
        model.generate(
            prompt(13), cache_implementation="int8", prompt_lookup_num_tokens=3, max_new_tokens=8
        )
