"""Where a run took place: everything that could explain why a second run says something else."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from evals import rivals
from kvplug.registry import REGISTRIES

PACKAGES = (
    "kvplug",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "numpy",
    "numba",
    "triton",
    "optimum-quanto",
    "hqq",
)


def describe(fingerprints: dict[str, str], devices: str, seed: int) -> dict[str, Any]:
    """Return what goes into env.json; fingerprints are of the model and the dataset, if any."""
    return {
        "git": git(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in PACKAGES}
        | plugins(),
        "hardware": hardware(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "placement": devices,
        "model": fingerprints.get("model"),
        "dataset": fingerprints.get("dataset"),
        "seed": seed,
    }


def git() -> str | None:
    """Return `git describe` of the checkout kvplug is imported from; None if it is not in one.

    The question is kvplug's state, not that of the folder one stands in, nor of a repository around
    an installed copy.
    """
    folder = Path(find_spec("kvplug").origin).parent
    try:
        subprocess.run(
            ["git", "-C", folder, "ls-files", "--error-unmatch", "."],
            check=True,
            capture_output=True,
        )
        told = ["git", "-C", folder, "describe", "--always", "--dirty"]
        return subprocess.run(told, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def version(package: str) -> str | None:
    """Return a package's version, or None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def plugins() -> dict[str, str]:
    """Return the versions of the distributions that add stages or rivals by entry point."""
    groups = (rivals.GROUP, *(registry.group for registry in REGISTRIES.values()))
    owners = (entry.dist for group in groups for entry in metadata.entry_points(group=group))
    return {dist.name: dist.version for dist in owners}


def hardware() -> str:
    """Return the GPU's name, or the CPU's with its cores."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()}x {torch.cuda.get_device_name()}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
