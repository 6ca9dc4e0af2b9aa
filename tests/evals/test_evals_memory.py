from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from evals.measure import peaks
from evals.measure import prefill as speed
from evals.measure.memory import held_bytes
from evals.setup.contenders import resolve

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


def take(megabytes: int) -> None:
    torch.ones(megabytes << 20, dtype=torch.uint8)


def test_torch_s_account_is_exact_and_goes_on_after_a_stop():
    peak = peaks.allocated(torch.device("cpu"))
    assert peak.how == "torch.profiler"
    peak.start()
    kept = torch.ones(5 << 20, dtype=torch.uint8)
    take(3)
    take(2)
    assert peak.stop() == 8 << 20, "what is kept and the largest of what is not"
    peak.start()
    del kept
    take(1)
    assert peak.stop() == 5 << 20, "it began with what is kept"
    peak.start()
    take(1)
    assert peak.stop() == 1 << 20


def test_nothing_goes_on_watching(tiny):
    """What is timed later would be slower."""
    peak = {"peak": peaks.allocated(torch.device("cpu"))}
    prompt = torch.ones(1, 30, dtype=torch.long)
    (strategy,) = resolve(["dynamic"])
    speed.prefill_and_peaks(tiny, strategy, prompt, 2, peak)
    assert not torch.autograd._profiler_enabled()
    strategy = SimpleNamespace(build=Mock(side_effect=RuntimeError("too long")))
    with pytest.raises(RuntimeError, match="too long"):
        speed.prefill_and_peaks(tiny, strategy, prompt, 2, peak)
    assert not torch.autograd._profiler_enabled()


def test_the_process_s_peak_is_seen_after_it_is_gone_and_then_forgotten():
    peak = peaks.Resident()
    if peak.how != "VmHWM":
        pytest.skip(peak.how)
    peak.start()
    take(64)
    first = peak.stop()
    peak.start()
    second = peak.stop()
    assert 60e6 < first < 90e6
    assert second < 30e6


def test_where_nobody_counts_it_is_none_with_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(peaks, "CLEAR_REFS", tmp_path / "none")
    for peak, how in (
        (peaks.allocated(torch.device("meta")), "torch counts no allocations on meta"),
        (peaks.Resident(), "no high-water mark on "),
    ):
        peak.start()
        assert peak.stop() is None
        assert peak.how.startswith(how)
