"""`disk`: in memory-mapped files."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from ..errors import SpecError
from ..stage import option
from .base import Place, Placement

if TYPE_CHECKING:
    from torch import Tensor


class OnDisk(Place):
    """Files in a temporary directory of this cache's own, mapped into memory and read by the page.

    A file loses its name as soon as it is mapped, so its bytes are given back with the last tensor
    that maps it, whatever ends the process; the directory goes with the cache.
    """

    def __init__(self, folder: str | None) -> None:
        self._folder = folder
        self._directory = Path(tempfile.mkdtemp(prefix="kvplug-", dir=folder))
        # not TemporaryDirectory: it warns of every cache that is simply dropped
        weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        self._count = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = math.prod(shape)
        if device.type == "meta" or size == 0:  # nothing to map
            where = "meta" if device.type == "meta" else "cpu"
            return torch.empty(shape, dtype=dtype, device=where)
        self._count += 1
        file = self._directory / f"{self._count}.bin"
        flat = torch.from_file(str(file), shared=True, size=size, dtype=dtype)
        with contextlib.suppress(PermissionError):  # Windows: it goes with the directory
            file.unlink()
        return flat.view(shape)

    def __deepcopy__(self, memo: dict) -> OnDisk:
        return OnDisk(self._folder)


@dataclass(frozen=True)
class Disk(Placement):
    """Keep blocks in memory-mapped files in a temporary directory, removed with the cache."""

    name: ClassVar[str] = "disk"
    folder: str | None = option(
        None, "where to make the temporary directory; None: the system's choice"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folder is not None and not Path(self.folder).is_dir():
            raise SpecError(f"disk(folder={self.folder!r}): no such directory")

    def open(self) -> OnDisk:
        return OnDisk(self.folder)
