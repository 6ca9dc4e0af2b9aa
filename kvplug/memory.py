"""How much memory a device has left."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .errors import SpecError

CGROUP = Path("/sys/fs/cgroup")  # of a container, whose limit may be below the machine's


def free(device: torch.device) -> int:
    """Bytes that a program could still take on `device`.

    Raises SpecError where the system does not say.
    """
    if device.type == "cuda":
        left, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return left + kept  # what torch's allocator keeps is free for a cache too
    if device.type == "cpu":
        limits = [n for n in (_available(), _left_in_container()) if n is not None]
        if limits:
            return min(limits)
    raise SpecError(
        f"the system does not say how much memory {str(device)!r} has left: say it, as in "
        "auto(budget='4GiB')"
    )


def _available() -> int | None:
    """What Linux estimates, caches of files counted as free; elsewhere the pages that are."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _left_in_container() -> int | None:
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - used)
