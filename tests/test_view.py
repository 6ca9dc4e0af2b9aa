"""Views are tensors in all but data: followed where code only reshapes, dense elsewhere."""

import copy
import dataclasses
import io
import logging

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers.integrations.sdpa_attention import repeat_kv

import kvplug
import kvplug.testing
from kvplug.attention.view import KeyView, ValueView, View, views
from kvplug.stats import Stats
from kvplug.testing.kernel import random_stored
from kvplug.testing.tools import assert_close, normal

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
    other = random_stored(pair[0].stored.codec, B=B, H=H, N=3, R=5, F=2, skip=3, seed=9)
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


WRITES = {
    "setitem": lambda x: x.__setitem__((slice(None), 0), 0.0),
    "iadd": lambda x: x.__iadd__(1),
    "imul": lambda x: x.__imul__(2),
    "add_": lambda x: x.add_(1),
    "zero_": lambda x: x.zero_(),
    "copy_": lambda x: x.copy_(torch.zeros(())),
    "masked_fill_": lambda x: x.masked_fill_(torch.tensor(True), 0),
    "index_copy_": lambda x: x.index_copy_(2, torch.tensor([0]), x[:, :, :1]),
    "out": lambda x: torch.add(x, 1, out=x),
    "out tuple": lambda x: torch.max(x, 2, out=(x, torch.tensor([]).long())),
    "relu_": torch.relu_,
    "inplace=True": lambda x: torch.nn.functional.relu(x, inplace=True),
    "dropout": lambda x: torch.nn.functional.dropout(x, 0.5, True, True),
    "init": torch.nn.init.zeros_,
    "foreach": lambda x: torch._foreach_add_([x], 1),
    "overload": lambda x: torch.ops.aten.add_.Tensor(x, 1),
    "packet": lambda x: torch.ops.aten.mul_(x, 2),
    "set data": lambda x: setattr(x, "data", torch.zeros(x.shape)),
    "requires_grad": lambda x: setattr(x, "requires_grad", True),
    "requires_grad_": lambda x: x.requires_grad_(),
    "resize_": lambda x: x.resize_(1),
    "set_": lambda x: x.set_(torch.zeros(1)),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("of", ["encoded", "plain", "repeated"])
def test_a_write_that_would_be_lost_is_an_error(pair, stats, name, of):
    view = pair[0]
    if of == "plain":  # the layer's own memory: no write may reach it in passing either
        tail = random_stored(pair[0].stored.codec, B=B, H=H, N=0, R=9)
        view = views(tail, kvplug.parse("reference").kernel, stats)[0]
    if of == "repeated":
        view = repeat_kv(view, 3)
    before = view.stored.dense()[0].clone()
    with pytest.raises(kvplug.ViewError, match=r"would be lost.* write to its clone\(\)"):
        WRITES[name](view)
    assert torch.equal(view.stored.dense()[0], before)


def test_a_write_from_below_python_is_an_error(pair):
    with (
        torch._C.DisableTorchFunctionSubclass(),
        pytest.raises(kvplug.ViewError, match=r"aten.add_.* would be lost"),
    ):
        torch.ops.aten.add_.Tensor(pair[0], 1)


def test_an_operator_of_ones_own_that_writes_is_an_error(pair):
    """Its name does not say so; its schema does."""

    @torch.library.custom_op("kvplug_test::clear", mutates_args=("x",))
    def clear(x: torch.Tensor) -> None:
        x.zero_()

    for call in (clear, torch.ops.kvplug_test.clear, torch.ops.kvplug_test.clear.default):
        with pytest.raises(kvplug.ViewError, match=r"clear.* would be lost"):
            call(pair[0])


def test_reading_a_view_into_something_else_is_no_write(pair, dense):
    target = torch.zeros(dense[0].shape)
    assert torch.equal(target.copy_(pair[0]), dense[0])
    target += pair[0]
    target[:, :, :3] = pair[0][:, :, :3]
    torch.add(pair[0], 1, out=target)
    assert torch.equal(target, dense[0] + 1)


POINTERS = {
    "data_ptr": lambda x: x.data_ptr(),
    "const_data_ptr": lambda x: x.const_data_ptr(),
    "untyped_storage": lambda x: x.untyped_storage(),
    "storage": lambda x: x.storage(),
    "_typed_storage": lambda x: x._typed_storage(),
}


@pytest.mark.parametrize("name", [name for name in POINTERS if hasattr(torch.Tensor, name)])
def test_there_is_no_memory_to_point_to(pair, stats, name):
    with pytest.raises(
        kvplug.ViewError, match=r"(_ptr|storage): .* no memory .*clone\(\).* numpy\(\)"
    ):
        POINTERS[name](pair[0])
    assert not stats.materialised


def test_an_extension_is_given_no_null_pointer(pair):
    """As code in C++ asks: it got address 0, and ended the process."""
    with (
        torch._C.DisableTorchFunctionSubclass(),
        pytest.raises(RuntimeError, match="Cannot access data pointer"),
    ):
        pair[0].data_ptr()


def test_arrays_that_keep_their_memory_are_right(pair, dense):
    """NumPy and DLPack hold on to the copy they were given."""
    for view, x in zip(pair, dense, strict=True):
        assert np.array_equal(np.asarray(view), x.numpy())
        assert np.array_equal(view.__array__(), x.numpy())
        assert np.array_equal(np.from_dlpack(view), x.numpy())
        assert torch.equal(torch.from_dlpack(view), x)
        assert not hasattr(view, "__cuda_array_interface__")
        assert torch.equal(copy.deepcopy(view), x)
        file = io.BytesIO()
        torch.save(view, file)
        file.seek(0)
        assert torch.equal(torch.load(file), x)


def test_questions_of_metadata_read_nothing(pair, stats, dense):
    for x, y in zip(pair, dense, strict=True):
        for ask in (
            *(torch.Tensor.stride, torch.Tensor.storage_offset, torch.Tensor.is_contiguous),
            *(torch.Tensor.ndimension, torch.Tensor.nelement, torch.Tensor.type),
            *(torch.Tensor.is_complex, torch.Tensor.is_inference, torch.Tensor._is_view),
            *(torch.Tensor.is_signed, torch.Tensor.dim_order, torch.Tensor.is_shared),
            *(torch.is_floating_point, torch.numel, lambda x: x.stride(-2)),
            *(lambda x: (x.is_leaf, x.grad, x.grad_fn, x.nbytes, x.itemsize, x._version),),
            *(lambda x: (x.is_sparse, x.is_quantized, x.is_cpu, x.is_nested, x.get_device()),),
        ):
            assert ask(x) == ask(y)
        assert hash(x) == hash(x)
        assert x is x
    assert not stats.materialised


def test_one_side_is_decoded_where_one_is_read(stored, stats):
    sides = []

    class Watched(type(stored.codec)):
        def decode_side(self, data, side):
            sides.append(side)
            return super().decode_side(data, side)

    codec = Watched(**dataclasses.asdict(stored.codec))
    pair = views(dataclasses.replace(stored, codec=codec), kvplug.parse("reference").kernel, stats)
    for side, expected in enumerate(stored.dense()):
        assert torch.equal(pair[side].clone(), expected)
        assert set(sides) == {side}
        sides.clear()
