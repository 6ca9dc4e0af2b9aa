"""`file://`: one file a record, in a folder that many processes may share."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from ..atomic import scratch
from ..errors import StoreError
from .backend import Backend, Entry
from .index import Index
from .record import LARGEST

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

SUFFIX = ".kv"
LEFT = 600.0  # seconds after which a temporary file has no writer any more


class Files(Backend):
    """Records in files of a local folder, `FOLDER/TENANT/KEY.kv`, beside `FOLDER/index.sqlite`.

    A record is written under a temporary name and renamed: who reads finds all of it or nothing.
    `max_bytes` bounds what can be read; each writer has one record more under way.
    Nothing is synced: what a power cut tears fails its checksum. Files are read, not mapped: a
    failing disk is then an error and not the end of the process.
    """

    def __init__(
        self,
        url: str,
        max_bytes: int | None = None,
        policy: str = "lru",
        ttl: float | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise StoreError(f"{url!r}: a folder is written file:///var/kv, with three slashes")
        self.folder = Path(unquote(parts.path))
        self._temporary = self.folder / "tmp"
        self._index = Index(
            str(self.folder / "index.sqlite"), max_bytes, policy, ttl, self._on_disk
        )
        self._swept = False

    @property
    def evicted(self) -> int:
        return self._index.evicted

    def get_many(self, keys: Sequence[bytes]) -> Iterator[bytes]:
        if not self._exists():
            return
        for key in keys[: self._index.use(keys)]:
            try:
                with open(self._path(key), "rb") as file:
                    record = file.read(min(os.fstat(file.fileno()).st_size, LARGEST))
            except FileNotFoundError:
                self._index.lost(key)
                return
            yield record

    def has_many(self, keys: Sequence[bytes]) -> int:
        return self._index.count(keys) if self._exists() else 0

    def put_many(self, items: Sequence[tuple[bytes, bytes]], after: Sequence[bytes] = ()) -> None:
        self._begin()
        self._index.reserve({key: len(x) for key, x in items}, after, self._drop)
        for key, record in items:
            self._write(key, record)

    def delete(self, keys: Iterable[bytes]) -> None:
        if self._exists():
            self._index.forget(keys, self._drop)

    def entries(self) -> Iterator[Entry]:
        return iter(self._index.entries() if self._exists() else ())

    def held(self) -> int:
        return self._index.held() if self._exists() else 0

    def pin(self, keys: Iterable[bytes], pinned: bool) -> None:
        if self._exists():
            self._index.pin(keys, pinned)

    def _exists(self) -> bool:
        return self._temporary.is_dir()

    def _path(self, key: bytes) -> Path:
        return self.folder / key[:8].hex() / f"{key[8:].hex()}{SUFFIX}"

    def _write(self, key: bytes, record: bytes) -> None:
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        try:
            with scratch(self._temporary, record) as new:
                self._index.settle(key, len(record), lambda: new.replace(path))
        except BaseException:
            self._index.forget([key], self._drop)
            raise

    def _drop(self, keys: list[bytes]) -> None:
        for key in keys:
            with suppress(FileNotFoundError):
                os.unlink(self._path(key))

    def _begin(self) -> None:
        """Make the folder; the first time, sweep what killed writers have left."""
        self._temporary.mkdir(parents=True, exist_ok=True)
        if self._swept:
            return
        self._swept = True
        for left in self._temporary.iterdir():
            with suppress(FileNotFoundError):
                if left.stat().st_mtime < time.time() - LEFT:
                    left.unlink()

    def _on_disk(self) -> Iterator[tuple[bytes, int, float]]:
        """What an index that was lost or is damaged begins with."""
        for path in self.folder.glob(f"*/*{SUFFIX}"):
            with suppress(ValueError, FileNotFoundError):
                key, stat = bytes.fromhex(path.parent.name + path.stem), path.stat()
                if len(key) == 32:
                    yield key, stat.st_size, stat.st_mtime
