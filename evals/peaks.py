"""The most memory that was taken at once, above what was taken before: by torch's account, which is
the same in every run, and by the system's.

Each is made before what it watches; `lap()` gives the highest point since the last lap, or None
where there is no account. `how` says which one it is, or why there is none.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import sys
from pathlib import Path
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity, profile

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak(Protocol):
    """What watches memory."""

    how: str

    def lap(self) -> int | None:
        """Return bytes above the first level, and start the next lap."""


def allocated(device: torch.device) -> Peak:
    """Return what watches torch's allocator of a device."""
    gc.collect()
    kinds = {"cpu": Profiled, "cuda": Cuda}
    return kinds[device.type]() if device.type in kinds else Unknown(device.type)


class Profiled:
    """Every allocation and release of torch's CPU allocator, as its profiler writes them down."""

    how = "torch.profiler"

    def __init__(self) -> None:
        self._level = 0
        self._start()

    def lap(self) -> int:
        self._profile.stop()
        events = self._profile.profiler.kineto_results.events()
        sizes = [
            event.nbytes()
            for event in sorted(events, key=lambda event: event.start_ns())
            if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
        ]
        levels = list(itertools.accumulate(sizes, initial=self._level))
        self._level = levels[-1]
        self._start()
        return max(levels)

    def _start(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()


class Cuda:
    """The high-water mark that torch's CUDA allocator keeps."""

    how = "torch.cuda.max_memory_allocated"

    def __init__(self) -> None:
        self._before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    def lap(self) -> int:
        top = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return top - self._before


class Unknown:
    """No account."""

    def __init__(self, device: str) -> None:
        self.how = f"torch counts no allocations on {device}"

    def lap(self) -> None:
        return None


class Resident:
    """The kernel's mark of the process's memory, whoever took it: libraries, mapped files, malloc.

    Freed memory that malloc kept is handed back first, so that its reuse does not hide an
    allocation; even so it moves by a third from run to run.
    """

    def __init__(self) -> None:
        self.how = "VmHWM" if CLEAR_REFS.exists() else f"no high-water mark on {sys.platform}"
        gc.collect()
        self._before = self._reset()

    def lap(self) -> int | None:
        if self._before is None:
            return None
        top = _high_water()
        self._reset()
        return max(0, top - self._before)

    def _reset(self) -> int | None:
        if self.how != "VmHWM":
            return None
        _trim()
        try:
            CLEAR_REFS.write_text("5")  # proc_pid_clear_refs(5): VmHWM falls to the present size
        except OSError as error:
            self.how = f"VmHWM cannot be reset: {error.strerror}"
            return None
        return _high_water()


def _high_water() -> int:
    """Return the process's largest resident size since the last reset, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _trim() -> None:
    """Hand free heap back to the system (glibc only: elsewhere a peak may come out too low)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
