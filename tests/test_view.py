"""Views are tensors in all but data: followed where code only reshapes, dense elsewhere."""

import logging

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers.integrations.sdpa_attention import repeat_kv

import kvplug
import kvplug.testing
from kvplug.stats import Stats
from kvplug.testing.kernel import random_stored
from kvplug.testing.tools import assert_close, normal
from kvplug.view import KeyView, ValueView, View, views

B, H, D = 2, 2, 16


@pytest.fixture
def stats():
    return Stats()


@pytest.fixture
def stored():
    return random_stored(kvplug.parse("int8(block=8)").codec, B=B, H=H, N=3, R=5, F=2, skip=3)


@pytest.fixture
def pair(stored, stats):
    return views(stored, kvplug.parse("reference").kernel, stats)


@pytest.fixture
def dense(stored):
    return stored.dense()


def test_metadata_without_data(pair, stats, stored):
    key, value = pair
    T = 2 + 3 * 8 - 3 + 5
    assert (type(key), type(value)) == (KeyView, ValueView)
    for x in pair:
        assert x.shape == x.size() == (B, H, T, D)
        assert (x.size(2), x.shape[-2], len(x), x.dim(), x.ndim) == (T, T, B, 4, 4)
        assert x.numel() == B * H * T * D
        assert (x.dtype, x.device.type, x.layout) == (torch.float32, "cpu", torch.strided)
        assert not x.requires_grad
        assert not x.is_cuda
        assert x.is_floating_point()
        assert x.element_size() == 4
        assert "int8" in repr(x)
        assert str(T) in repr(x)
        assert isinstance(x, torch.Tensor)
    assert not stats.materialised


def test_keys_and_values_may_differ_in_width(stats):
    stored = random_stored(kvplug.parse("int4(block=8)").codec, Dk=24, Dv=16)
    key, value = views(stored, kvplug.parse("reference").kernel, stats)
    assert (key.shape[-1], value.shape[-1]) == (24, 16)
    out = sdpa(normal(1, 2, 1, 24, seed=0), key, value)
    assert out.shape == (1, 2, 1, 16)
    assert_close(out, sdpa(normal(1, 2, 1, 24, seed=0), *stored.dense()))
    assert not stats.materialised


@pytest.mark.parametrize("how", ["plain", "repeat_kv", "enable_gqa", "contiguous", "packed"])
@pytest.mark.parametrize("S", [1, 4])
def test_attention_reads_what_is_stored(pair, dense, stats, how, S):
    """Heads are repeated in name only, however the model's code asks for it."""
    (key, value), (k, v) = pair, dense
    n = 1 if how == "plain" else 3
    query = normal(B, H * n, S, D, seed=1)
    expected = sdpa(query, k.repeat_interleave(n, 1), v.repeat_interleave(n, 1))
    if how == "repeat_kv":
        key, value = repeat_kv(key, n), repeat_kv(value, n)
        assert key.shape == (B, H * n, k.shape[2], D)
    if how == "contiguous":
        key, value = repeat_kv(key, n).contiguous(), repeat_kv(value, n).contiguous()
    if how == "packed":  # the queries of a head as rows of one
        query = query.reshape(B, H, n * S, D)
        expected = sdpa(query, k, v)
    out = sdpa(query, key, value, enable_gqa=how == "enable_gqa")
    assert type(out) is torch.Tensor
    assert_close(out, expected)
    assert stats.kernels == {"reference": 1}
    assert not stats.materialised


def test_masks_and_scale_reach_the_kernel(pair, dense, stats):
    query, T = normal(B, H, 3, D, seed=1), dense[0].shape[2]
    mask = torch.rand(B, 1, 3, T, generator=torch.Generator().manual_seed(0)) < 0.5
    for kwargs in (
        {"attn_mask": mask},
        {"attn_mask": torch.where(mask, 0.0, -1e9)},
        {"is_causal": True},
        {"scale": 0.7},
    ):
        assert_close(sdpa(query, *pair, **kwargs), sdpa(query, *dense, **kwargs))
    assert not stats.materialised
    assert stats.kernels == {"reference": 4}


OPERATIONS = {
    "transpose": lambda x: x.transpose(2, 3),
    "matmul": lambda x: torch.matmul(x, x.mT) if isinstance(x, torch.Tensor) else None,
    "add": lambda x: x + 1,
    "radd": lambda x: 1 + x,
    "slice": lambda x: x[:, :, 2:5],
    "index": lambda x: x[0],
    "ellipsis": lambda x: x[..., None, :],
    "cat": lambda x: torch.cat([x, x], 2),
    "float64": lambda x: x.to(torch.float64),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "sum": lambda x: x.sum(-1),
    "permute": lambda x: x.permute(0, 2, 1, 3),
    "view": lambda x: x.reshape(B, -1),
    "expand": lambda x: x[:, :, None].expand(B, H, 2, x.shape[2], D).sum(2),
    "odd reshape": lambda x: x[:, :, None].expand(B, H, 2, x.shape[2], D).reshape(B, -1, D),
    "einsum": lambda x: torch.einsum("bhtd,bhsd->bhts", x, x),
    "softmax": lambda x: torch.nn.functional.softmax(x, -1),
    "stack": lambda x: torch.stack([x, x]),
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "repeat_kv, then add": lambda x: repeat_kv(x, 3) + 1,
    "unsqueeze": lambda x: x.unsqueeze(0),
    "bool": lambda x: x > 0,
    "equal": lambda x: torch.tensor(torch.equal(x, x)),
    "where": lambda x: torch.where(x > 0, x, 0),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("side", [0, 1])
def test_anything_else_is_the_dense_tensor(pair, dense, stats, name, side):
    operation = OPERATIONS[name]
    out = operation(pair[side])
    assert torch.equal(out, operation(dense[side]))
    assert not isinstance(out, View)
    assert sum(stats.materialised.values()) >= 1
    assert not stats.kernels


def test_from_below_python(pair, dense, stats):
    """`__torch_dispatch__`: an operator that reaches a view without going through `torch`."""
    with torch._C.DisableTorchFunctionSubclass():
        out = torch.ops.aten.add.Tensor(pair[0], 1)
        nested = sdpa(normal(B, H, 1, D, seed=1), *pair)
    assert torch.equal(out, dense[0] + 1)
    assert_close(nested, sdpa(normal(B, H, 1, D, seed=1), *dense))
    assert any("add" in reason for reason in stats.materialised)


def test_views_of_two_layers_do_not_mix(pair, dense, stats):
    """Keys of one layer with values of another: right, by the dense way."""
    other = random_stored(pair[0]._stored.codec, B=B, H=H, N=3, R=5, F=2, skip=3, seed=9)
    other_value = views(other, kvplug.parse("reference").kernel, stats)[1]
    query = normal(B, H, 1, D, seed=1)
    out = sdpa(query, pair[0], other_value)
    assert_close(out, sdpa(query, dense[0], other.dense()[1]))
    assert stats.materialised
    assert not stats.kernels


@pytest.mark.parametrize("case", ["swapped", "query is a view", "key is a tensor"])
def test_unusual_arguments(pair, dense, stats, case):
    (key, value), (k, v), query = pair, dense, normal(B, H, 1, D, seed=1)
    ours, theirs = {
        "swapped": ((query, value, key), (query, v, k)),
        "query is a view": ((key, key, value), (k, k, v)),
        "key is a tensor": ((query, k, value), (query, k, v)),
    }[case]
    assert_close(sdpa(*ours), sdpa(*theirs))
    assert stats.materialised


def test_dropout_is_not_the_kernels(pair, dense, stats):
    query = normal(B, H, 1, D, seed=1)
    torch.manual_seed(0)
    out = sdpa(query, *pair, dropout_p=0.5)
    torch.manual_seed(0)
    assert_close(out, sdpa(query, *dense, dropout_p=0.5))
    assert not stats.kernels


def test_it_is_said_once_per_reason(pair, stats, caplog):
    with caplog.at_level(logging.WARNING, logger="kvplug"):
        for _ in range(3):
            pair[0].transpose(2, 3)
        pair[1].clone()
    assert stats.materialised == {"transpose": 3, "clone": 1}
    assert [r.getMessage().split()[1] for r in caplog.records] == ["transpose", "clone"]


def test_what_was_returned_earlier_stays_right():
    """A view belongs to its call: the next update of the layer does not shift it."""
    cache = kvplug.build("int8(block=8)", kvplug.testing.tiny_llama().config)
    k = normal(1, 2, 30, 16, seed=0)
    key, _ = cache.layers[0].update(k, k)
    key, _ = cache.layers[0].update(k[:, :, :1], k[:, :, :1])
    before = key.clone()
    assert before.shape[2] == 31
