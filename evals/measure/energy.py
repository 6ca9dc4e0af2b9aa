"""Joules, where the machine counts them: RAPL for processors (Linux), NVML for NVIDIA's GPUs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

POWERCAP = Path("/sys/class/powercap")


def meter(device: torch.device) -> Callable[[], float] | None:
    """Return what reads joules used since some moment, or None where nothing can be read.

    All of the processor's packages, or all of the GPU: whatever else runs there is in it.
    """
    return _gpu(device) if device.type == "cuda" else _processor()


def _processor() -> Callable[[], float] | None:
    # packages are intel-rapl:0, on AMD too; intel-rapl:0:0 is a part of one
    try:
        packages = [Package(path) for path in POWERCAP.glob("*-rapl:*") if path.name.count(":") < 2]
    except OSError:  # for root only, on most systems
        return None
    return (lambda: sum(package.joules() for package in packages)) if packages else None


@dataclass
class Package:
    """A counter of microjoules that starts again from zero at its range."""

    folder: Path
    total: int = 0
    last: int = field(init=False)

    def __post_init__(self) -> None:
        """Read it once: where that fails, there is no meter."""
        self.range = self._number("max_energy_range_uj")
        self.last = self._number("energy_uj")

    def joules(self) -> float:
        """Return joules since the meter was made."""
        now = self._number("energy_uj")
        self.total += (now - self.last) % self.range
        self.last = now
        return self.total / 1e6

    def _number(self, name: str) -> int:
        return int((self.folder / name).read_text())


def _gpu(device: torch.device) -> Callable[[], float] | None:
    try:
        import pynvml  # comes with nvidia-ml-py
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(name)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:  # not before Volta
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
