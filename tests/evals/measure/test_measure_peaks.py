from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from evals.measure import peaks, prefill
from evals.setup.contenders import resolve


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
    (contender,) = resolve(["dynamic"])
    prefill.prefill_and_peaks(tiny, contender, prompt, 2, peak)
    assert not torch.autograd._profiler_enabled()
    contender = SimpleNamespace(build=Mock(side_effect=RuntimeError("too long")))
    with pytest.raises(RuntimeError, match="too long"):
        prefill.prefill_and_peaks(tiny, contender, prompt, 2, peak)
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
