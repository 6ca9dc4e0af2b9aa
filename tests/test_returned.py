"""What `update` returns stays right until the next one, whatever becomes of the layer."""

import copy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kvplug
import kvplug.testing
from kvplug.attention.view import View
from kvplug.testing.oracle import one_layer
from kvplug.testing.tools import assert_close, normal
from kvplug.testing.tools import dense as dense_of


@pytest.mark.parametrize(
    "spec", ["int8(block=8)", "sinks(sinks=2, window=20)+int4(block=8, tail=8)"]
)
def test_what_was_returned_stays_right_until_the_next_update(spec):
    """Whatever becomes of the layer: tokens of its tail are encoded, rows leave and change."""
    layer = one_layer(kvplug.parse(spec))
    layer.update(*(normal(2, 2, 30, 16, seed=s) for s in (0, 1)))
    layer.settle()
    encoded = layer.stats.blocks_encoded
    for seed in range(8):  # one of them fills a block
        new = normal(2, 2, 1, 16, seed=seed)
        expected = [torch.cat((x, new), dim=2) for x in (layer.keys, layer.values)]
        returned = layer.update(new, new)
        layer.settle()
        if layer.stats.blocks_encoded > encoded:
            break
    assert layer.stats.blocks_encoded == encoded + 1
    for change in (
        lambda: None,
        lambda: layer.crop(-3),
        lambda: layer.reorder_cache(torch.tensor([1, 0])),
        lambda: layer.batch_repeat_interleave(2),
        lambda: layer.batch_select_indices(torch.tensor([3])),
        lambda: layer.reset(),
    ):
        change()
        for x, y in zip(returned, expected, strict=True):
            assert isinstance(x, View)
            assert torch.equal(dense_of(x), y)


@pytest.mark.parametrize(
    "spec",
    [
        "growing",
        "static",
        "window(length=9)",
        "sinks(sinks=3, window=8)",
        "sinks(sinks=3, window=8)+int8(block=8)",
        "static+int8(block=8)",
        "exact(block=8)+host",
    ],
)
@pytest.mark.parametrize("row_padding", [(0, 0), (0, 14)])
def test_what_update_returned_stays_until_the_next_update(spec, row_padding):
    """By value, whatever else is read or done in between; attention reads what `update` gave."""
    model = kvplug.testing.tiny_llama()
    cache = kvplug.build(spec, model.config, max_cache_len=64)
    layer, padding = cache.layers[0], torch.tensor(row_padding)
    if hasattr(layer, "set_padding"):
        layer.set_padding(padding)
    for i in range(40):
        S = 3 if i % 7 == 0 else 1
        x = normal(2, 2, S, 16, seed=i)
        returned = layer.update(x, x + 1)
        then = [kvplug.testing.tools.dense(y).clone() for y in returned]
        query = normal(2, 2, 1, 16, seed=i)
        seen = torch.arange(then[0].shape[2])[None] < int(layer.get_seq_length())
        expected = sdpa(query, *then, attn_mask=seen)
        held = layer.keys, layer.values
        layer.get_mask_sizes(1)
        twin = copy.deepcopy(layer)
        if i % 5 == 4:
            layer.activate_past_recording() if hasattr(layer, "record_past") else None
            layer.crop(0)
        for y, z in zip(returned, then, strict=True):
            assert torch.equal(kvplug.testing.tools.dense(y), z)
        assert_close(sdpa(query, *returned, attn_mask=seen), expected)
        assert torch.equal(twin.keys, held[0])
        if "sinks" in spec and i > 20 and S == 1:
            assert torch.equal(held[1][0, :, :3], then[1][0, :, :3]), "sinks are where they were"
