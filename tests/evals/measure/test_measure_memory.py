from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from evals.measure.memory import held_bytes

KB = 1024


def block(n: int = KB) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.uint8)


def test_shared_storage_counts_once():
    x = block()
    assert held_bytes([x, x, x[10:20], x.view(32, 32), x.detach(), x.numpy()]) == KB


def test_a_view_counts_as_the_whole_storage_it_keeps_alive():
    assert held_bytes({"k": block()[:1]}) == KB


def test_overlapping_arrays_are_a_union_of_addresses():
    x = np.zeros(KB, np.uint8)
    assert held_bytes([x[:600]]) == KB, "the base is alive"
    assert held_bytes([torch.from_numpy(x)[100:], x]) == KB


def test_the_walk_goes_wherever_a_tensor_can_hide():
    @dataclass(slots=True)
    class Slots:
        x: torch.Tensor

    class Sub(torch.Tensor):
        pass

    inner = block().as_subclass(Sub)
    inner.scale = block()  # a tensor on a tensor
    in_closure, as_default = block(), block()

    def function(x=as_default):
        return in_closure, x

    loop = []
    loop.append(loop)
    places = [Slots(block()), inner, function, partial(max, block()), {block(): None}, loop]
    assert held_bytes(places) == 7 * KB


def test_what_a_cache_does_not_own_is_not_counted():
    layer = torch.nn.Linear(8, 8)
    meta = torch.empty(KB, device="meta")
    assert held_bytes([layer, torch, type("T", (), {"x": block()}), meta]) == 0


def test_a_dynamic_cache_holds_keys_and_values():
    cache = DynamicCache()
    for index in range(2):
        cache.update(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8), index)
    assert held_bytes(cache) == 2 * 2 * 2 * 5 * 8 * 4


def test_packed_tensors_of_quanto_count_what_is_packed():
    quanto = pytest.importorskip("optimum.quanto")
    x = torch.randn(64, 64)
    scale, shift = quanto.MaxOptimizer()(x, quanto.qint4, 0, 64)
    packed = quanto.quantize_weight(x, quanto.qint4, 0, scale, shift, 64)
    assert 64 * 64 // 2 <= held_bytes(packed) <= 64 * 64 // 2 + 2 * 64 * 4
