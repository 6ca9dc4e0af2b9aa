"""What callers hand to a layer that is not quite what its signature says."""

import pytest
import torch

import kvplug
from kvplug.compat import cache_argument
from kvplug.testing import tiny_llama
from kvplug.testing.tools import prompt

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


@pytest.mark.parametrize("spec", SPECS)
def test_a_forward_pass_with_gradients_leaves_no_graph_behind(spec):
    model = tiny_llama()
    cache = kvplug.build(spec, model.config, max_cache_len=32)
    for ids in prompt(12).split([9, 1, 1, 1], dim=1):
        logits = model(ids, **cache_argument(cache)).logits
    assert logits.requires_grad
    assert not cache.layers[0].keys.requires_grad
    assert not cache.layers[0].values.requires_grad
