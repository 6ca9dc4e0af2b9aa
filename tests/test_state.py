"""The state of a cache: plain tensors and numbers, by which it lives on elsewhere."""

import json
import re

import pytest
import torch
from safetensors.torch import load, save
from transformers import Gemma2Config

import kvplug
from kvplug.compat import cache_argument
from kvplug.testing.architectures import Absent, make
from kvplug.testing.codec import from_json, to_json
from kvplug.testing.tools import prompt, same

SPECS = (
    "growing",
    "sinks(sinks=2, window=9)+int4(block=8, tail=0)",
    "window(length=7)+host",
    "static(max_cache_len=32)",
    "static(max_cache_len=32)+int8(block=8)",
    "int4(block=8, tail=0)+disk",
)
CONFIG = Gemma2Config(
    num_hidden_layers=2, sliding_window=6, layer_types=["sliding_attention", "full_attention"],
    vocab_size=97, hidden_size=32, intermediate_size=32, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16,
)  # fmt: skip


def filled(spec):
    """A cache of one sliding and one full layer, filled by arithmetic alone."""
    cache = kvplug.build(spec, CONFIG)
    for first, n in ((0, 11), (11, 1), (12, 1)):
        i = torch.arange(first * 16, (first + n) * 16, dtype=torch.float64)
        keys, values = ((i * 37 % 101) - 50) / 16, ((i * 53 % 89) - 44) / 32
        pair = [x.float().view(1, 1, n, 16).repeat(2, 1, 1, 1) for x in (keys, values)]
        for layer in range(2):
            cache.update(*pair, layer)
    return cache


def through_bytes(state):
    """The state as it comes from a safetensors file and JSON."""
    tensors = {k: x.contiguous().clone() for k, x in state.items() if isinstance(x, torch.Tensor)}
    numbers = {k: x for k, x in state.items() if k not in tensors}
    return load(save(tensors)) | json.loads(json.dumps(numbers))


@pytest.mark.parametrize("spec", SPECS)
def test_golden_states(spec, golden):
    """What was written stays readable: names, shapes and bytes are those on record."""
    path = golden["folder"] / "state" / f"{re.sub(r'[^a-z0-9]+', '-', spec).strip('-')}.json"
    state = filled(spec).state_dict()
    if golden["regen"]:
        path.parent.mkdir(exist_ok=True)
        record = {k: to_json(x) if isinstance(x, torch.Tensor) else x for k, x in state.items()}
        path.write_text(json.dumps(record, indent=1) + "\n")
    assert path.exists(), f"no golden state at {path}: run pytest --regen once and commit the file"
    record = json.loads(path.read_text())
    kept = {k: from_json(x) if isinstance(x, dict) else x for k, x in record.items()}
    assert list(kept) == list(state)
    for name, x in state.items():
        if isinstance(x, torch.Tensor):
            assert same(x.contiguous(), kept[name]), name
        else:
            assert x == kept[name], name
    fresh = kvplug.build(kvplug.parse(record["strategy"]), CONFIG)
    fresh.load_state_dict(kept)
    for ours, theirs in zip(fresh.layers, filled(spec).layers, strict=True):
        assert same(ours.keys.contiguous(), theirs.keys.contiguous())
        assert same(ours.values.contiguous(), theirs.values.contiguous())


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("llama", "int8(block=8)"),
        ("gemma3, sliding", "sinks(sinks=2, window=20)"),
        ("gemma3, sliding", "static+int4(block=8)"),
        ("falcon_h1, mamba in each layer", "int8(block=8)"),
        ("falcon_h1, mamba in each layer", "static"),
        ("qwen3_next, linear hybrid", "window(length=9)+host"),
    ],
)
def test_another_cache_goes_on(name, spec):
    """States of every kind of layer, transformers' own included, through files."""
    try:
        model = make(name)
    except Absent as e:
        pytest.skip(str(e))
    new = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    ids = prompt(21, 2)
    first = kvplug.build(spec, model.config, max_cache_len=64)
    start = model.generate(ids, **cache_argument(first), **new)
    state = through_bytes(first.state_dict())
    written = {name: x.clone() for name, x in state.items() if isinstance(x, torch.Tensor)}
    other = kvplug.build(spec, model.config, max_cache_len=64)
    other.load_state_dict(state)
    assert other.state_dict().keys() == state.keys()
    longer = torch.cat((start, prompt(3, 2, seed=4)), 1)
    wanted = model.generate(longer, **cache_argument(first), **new)
    assert torch.equal(model.generate(longer, **cache_argument(other), **new), wanted)
    for name, x in written.items():
        assert same(state[name], x), f"{name} was loaded without a copy"


def test_a_state_is_of_its_strategy():
    state = filled("growing").state_dict()
    other = filled("window(length=7)+host")
    before = other.layers[1].keys
    with pytest.raises(kvplug.Mismatch, match=r"strategy 'window.*cannot hold .* 'full"):
        other.load_state_dict(state)
    with pytest.raises(kvplug.Mismatch, match=r"number of layers 2 .* number of layers 1"):
        filled("growing").load_state_dict(
            {k: x for k, x in state.items() if not k.startswith("layers.1.")}
        )
    with pytest.raises(kvplug.Mismatch, match=r"format 1 .* format None"):
        filled("growing").load_state_dict({})
    assert same(other.layers[1].keys, before)
