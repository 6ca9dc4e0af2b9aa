"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def scratch(folder: Path, data: bytes, *, prefix: str = "", synced: bool = False) -> Iterator[Path]:
    """A new file of this content, for the caller to give its name; if it has none, it is deleted.

    Args:
        folder: where it is made, on the file system of the name it is going to have.
        data: all that is in it.
        prefix: of the name it has until then.
        synced: whether the disk has it before anybody sees it.
    """
    handle, name = tempfile.mkstemp(prefix=prefix, dir=folder)
    path = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            if synced:
                file.flush()
                os.fsync(handle)
        yield path
    finally:
        path.unlink(missing_ok=True)


def write(path: Path, data: bytes) -> None:
    """Put a file of this content, for all to read, in the place of the one that is there."""
    with scratch(path.parent, data, prefix=f".{path.name}-", synced=True) as new:
        new.chmod(0o644)
        new.replace(path)
