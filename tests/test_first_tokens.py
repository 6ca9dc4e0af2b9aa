"""The first tokens of each row stay exact where the codec asks for it, wherever a row begins."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kvplug
from kvplug.testing.oracle import one_layer
from kvplug.testing.tools import dense, normal, same

PADDING = [0, 3, 9]


def filled(spec, n=40, padding=PADDING):
    layer = one_layer(kvplug.parse(spec), torch.tensor(padding))
    keys, values = (normal(len(padding), 2, n, 16, seed=seed) for seed in (1, 2))
    layer.update(keys, values)
    return layer, keys, values


@pytest.mark.parametrize("first", [0, 1, 4])
def test_they_are_exact_and_others_are_not(first):
    layer, keys, _ = filled(f"int4(block=8, tail=0, first={first})")
    for row, start in enumerate(PADDING):
        exact = (layer.keys == keys)[row].all(-1).all(0)  # [T]
        assert exact[start : start + first].all()
        assert not exact[start + first : 32].any()


@pytest.mark.parametrize("kernel", ["numba", "reference"])
@pytest.mark.parametrize("S", [1, 3])
def test_kernels_read_what_a_dense_copy_holds(kernel, S):
    """Each in its own order of columns, with transformers' mask for padding."""
    layer, *_ = filled(f"int4(block=8, tail=0)+{kernel}")
    new = normal(3, 2, S, 16, seed=3)
    k, v = layer.update(new, new)
    T = k.shape[2]
    column, query = torch.arange(T), normal(3, 4, S, 16, seed=4)
    mask = (column >= torch.tensor(PADDING)[:, None])[:, None, None]  # [B, 1, 1, T]
    mask = mask & (column <= torch.arange(T - S, T)[:, None])  # [B, 1, S, T]
    wanted = sdpa(query, dense(k), dense(v), attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(sdpa(query, k, v, attn_mask=mask, enable_gqa=True), wanted)
    hidden = mask.masked_fill(mask.logical_not(), False).float().log()
    torch.testing.assert_close(sdpa(query, k, v, attn_mask=hidden, enable_gqa=True), wanted)


def test_no_block_is_cut_before_all_rows_have_shown_theirs():
    layer, keys, values = filled("int4(block=8, tail=0)", n=20, padding=[0, 18])
    assert layer.encoded()[2] is None
    layer.update(keys[:, :, :2], values[:, :, :2])
    begin, end, _ = layer.encoded()
    assert (begin, end) == (4, 20)


@pytest.mark.parametrize("left", [2, 6, 11, 30])
def test_a_rollback_leaves_them_exact(left):
    layer, keys, values = filled("int8(block=8)")
    layer.crop(left - 40)
    layer.update(keys[:, :, :1], values[:, :, :1])
    for row, start in enumerate(PADDING):
        end = min(start + 4, left)
        held = layer.keys[row, :, start:end]
        assert same(held.contiguous(), keys[row, :, start:end].contiguous())
