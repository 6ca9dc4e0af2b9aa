"""The most memory that was taken at once, above what was taken before: by torch's account, which is
the same in every run, and by the system's.

Each watches from `start` to `stop`, which gives the highest point in between, or None where there
is no account; what was taken before the first start does not count. `how` says which account it is,
or why there is none.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import sys
from pathlib import Path
from typing import Protocol

import torch
from torch.autograd.profiler import profile

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak(Protocol):
    """What watches memory."""

    how: str

    def start(self) -> None:
        """Watch."""

    def stop(self) -> int | None:
        """Watch no longer; return the most bytes since `start`, above the level at the first."""


def allocated(device: torch.device) -> Peak:
    """Return what watches torch's allocator of a device."""
    gc.collect()
    if device.type == "cpu":
        return Profiled()
    return Cuda(device) if device.type == "cuda" else Unknown(device)


class Profiled:
    """Every allocation and release of torch's CPU allocator, as its profiler writes them down."""

    how = "torch.profiler"

    def __init__(self) -> None:
        # at every lower level Kineto writes a line to stderr at each start and stop
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        self._level = 0

    def start(self) -> None:
        self._profile = profile(profile_memory=True).__enter__()

    def stop(self) -> int:
        self._profile.__exit__(None, None, None)
        events = self._profile.kineto_results.events()
        sizes = [
            event.nbytes()
            for event in sorted(events, key=lambda event: event.start_ns())
            if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
        ]
        levels = list(itertools.accumulate(sizes, initial=self._level))
        self._level = levels[-1]
        return max(levels)


class Cuda:
    """The high-water mark that torch's CUDA allocator keeps."""

    how = "torch.cuda.max_memory_allocated"

    def __init__(self, device: torch.device) -> None:
        self.device, self._before = device, torch.cuda.memory_allocated(device)

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def stop(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self._before


class Unknown:
    """No account."""

    def __init__(self, device: torch.device) -> None:
        self.how = f"torch counts no allocations on {device.type}"

    def start(self) -> None:
        """Do nothing."""

    def stop(self) -> None:
        return None


class Resident:
    """The kernel's mark of the process's memory, whoever took it: libraries, mapped files, malloc.

    Freed memory that malloc kept is handed back first, so that its reuse does not hide an
    allocation; even so it moves by a third from run to run.
    """

    def __init__(self) -> None:
        self.how = "VmHWM" if CLEAR_REFS.exists() else f"no high-water mark on {sys.platform}"
        gc.collect()
        self.start()
        self._before = _high_water() if self.how == "VmHWM" else 0

    def start(self) -> None:
        if self.how != "VmHWM":
            return
        _trim()
        try:
            CLEAR_REFS.write_text("5")  # proc_pid_clear_refs(5): VmHWM falls to the present size
        except OSError as error:
            self.how = f"VmHWM cannot be reset: {error.strerror}"

    def stop(self) -> int | None:
        return max(0, _high_water() - self._before) if self.how == "VmHWM" else None


def _high_water() -> int:
    """Return the process's largest resident size since the last reset, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _trim() -> None:
    """Hand free heap back to the system (glibc only: elsewhere a peak may come out too low)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
