"""`disk`: in memory-mapped files."""

from __future__ import annotations

import errno
import math
import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from ..errors import NoRoom, SpecError
from ..stage import option
from .base import Place, Placement

if TYPE_CHECKING:
    from torch import Tensor

DESCRIPTORS = ("/proc/self/fd", "/dev/fd")  # where open files have a name, on Linux and on macOS
ZEROS = bytes(1 << 20)


class OnDisk(Place):
    """Files without a name, mapped into memory and read by the page.

    The bytes of a file are given back with the last tensor that maps it, whatever ends the process.
    """

    def __init__(self, folder: str | None) -> None:
        self._folder = folder

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room of `shape` in a file of its own.

        Raises NoRoom where the folder cannot take it: now, not when the room is written.
        """
        size = math.prod(shape)
        if device.type == "meta" or size == 0:  # nothing to map
            where = "meta" if device.type == "meta" else "cpu"
            return torch.empty(shape, dtype=dtype, device=where)
        nbytes = size * dtype.itemsize
        try:
            with tempfile.TemporaryFile(prefix="kvplug-", dir=self._folder) as file:
                _reserve(file.fileno(), nbytes)
                flat = _mapped(file.fileno(), size, dtype)
        except OSError as e:
            folder = self._folder or tempfile.gettempdir()
            raise NoRoom(
                e.errno,
                f"{e.strerror}: 'disk' has no room for {nbytes:,} more bytes of the cache; free "
                "some, or name another folder: disk(folder='...')",
                folder,
            ) from e
        return flat.view(shape)


def _reserve(file: int, nbytes: int) -> None:
    """Make a file `nbytes` long, all of it its own: a hole that finds no room ends the process."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, nbytes)
            return
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the file system cannot
                raise
    for begin in range(0, nbytes, len(ZEROS)):
        rest = memoryview(ZEROS)[: nbytes - begin]
        while rest:
            rest = rest[os.write(file, rest) :]


def _mapped(file: int, size: int, dtype: torch.dtype) -> Tensor:
    """The content of an open file as a tensor [size], which outlives the descriptor."""
    for folder in DESCRIPTORS:
        if (name := Path(folder, str(file))).exists():
            return torch.from_file(str(name), shared=True, size=size, dtype=dtype)
    # Windows: the mapping keeps a descriptor
    return torch.frombuffer(mmap.mmap(file, size * dtype.itemsize), dtype=dtype)


@dataclass(frozen=True)
class Disk(Placement):
    """Keep blocks in memory-mapped files without a name: nothing is left, whatever happens."""

    name: ClassVar[str] = "disk"
    folder: str | None = option(None, "where to make the files; None: the system's choice")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folder is None:
            return
        if not Path(self.folder).is_dir():
            raise SpecError(f"disk(folder={self.folder!r}): no such directory")
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise SpecError(f"disk(folder={self.folder!r}): this process may not write there")

    def open(self) -> OnDisk:
        return OnDisk(self.folder)
