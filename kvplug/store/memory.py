"""`memory://`: records of this process, gone with it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, ClassVar

from ..errors import StoreError
from .backend import Backend, Entry
from .index import Index

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


class Memory(Backend):
    """Records in a dict. `memory://` takes no path: hand the Store to who shall share it."""

    private: ClassVar[bool] = True

    def __init__(
        self,
        url: str,
        max_bytes: int | None = None,
        policy: str = "lru",
        ttl: float | None = None,
    ) -> None:
        if url != "memory://":
            raise StoreError(f"{url!r}: memory:// takes no path; records end with the process")
        self._records: dict[bytes, bytes] = {}
        self._index = Index(max_bytes=max_bytes, policy=policy, ttl=ttl)
        self._lock = threading.Lock()

    @property
    def evicted(self) -> int:
        return self._index.evicted

    def get_many(self, keys: Sequence[bytes]) -> Iterator[bytes]:
        with self._lock:
            found = [self._records[key] for key in keys[: self._index.use(keys)]]
        return iter(found)  # references: what is evicted while they are read stays readable

    def has_many(self, keys: Sequence[bytes]) -> int:
        return self._index.count(keys)

    def put_many(self, items: Sequence[tuple[bytes, bytes]], after: Sequence[bytes] = ()) -> None:
        with self._lock:
            self._index.reserve({key: len(x) for key, x in items}, after, self._drop)
            self._records.update(items)

    def delete(self, keys: Iterable[bytes]) -> None:
        with self._lock:
            self._index.forget(keys, self._drop)

    def entries(self) -> Iterator[Entry]:
        return iter(self._index.entries())

    def held(self) -> int:
        return self._index.held()

    def pin(self, keys: Iterable[bytes], pinned: bool) -> None:
        self._index.pin(keys, pinned)

    def _drop(self, keys: list[bytes]) -> None:
        for key in keys:
            self._records.pop(key, None)
