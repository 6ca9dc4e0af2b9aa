"""What keeps records: a protocol of five methods, and the back end for a URL.

kvplug knows nothing of databases and networks: each back end is a thin layer over an engine that
exists. Third parties add theirs by entry point, the scheme of its URLs as name:

```toml
[project.entry-points."kvplug.stores"]
lmcache = "their_package.kvplug_store:LMCache"  # kvplug.Store("lmcache://host")
```
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ..errors import StoreError, unknown
from ..registry import load

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

GROUP = "kvplug.stores"
BUILTIN = {
    "memory": "kvplug.store.memory:Memory",
    "file": "kvplug.store.files:Files",
    "redis": "kvplug.store.redis:Redis",
    "rediss": "kvplug.store.redis:Redis",
    "unix": "kvplug.store.redis:Redis",
}
REMOTE = "kvplug.store.remote:Remote"  # for what fsspec knows


class Full(OSError):
    """No room for a record: the text says what would give some."""


class Entry(NamedTuple):
    """What a back end can say of a record; None: it does not know."""

    key: bytes  # 32 bytes
    size: int  # bytes
    created: float | None = None  # seconds since the epoch
    expires: float | None = None  # the same
    hits: int | None = None  # how often it was read
    pinned: bool = False


class Backend(ABC):
    """Keeps records, bytes of any content, under keys of 32 bytes; shared by many processes.

    The keyword arguments of `__init__` behind `url` are the options of `kvplug.Store` that the
    back end takes, among `max_bytes`, `policy`, `ttl`. It raises StoreError for a URL that cannot
    be, and does not connect yet. Methods may raise any Exception: it becomes a miss, or a record
    that is not written. They are called from several threads. `kvplug.testing.StoreConformance`
    holds a back end to this.
    """

    private: ClassVar[bool] = False  # whether records are of one object, and end with it
    atomic: ClassVar[bool] = True  # whether who reads while others write sees whole records
    evicted: int = 0  # records that this object has dropped for others

    @abstractmethod
    def __init__(self, url: str) -> None: ...

    @abstractmethod
    def get_many(self, keys: Sequence[bytes]) -> Iterator[bytes]:
        """The records of `keys` in order, until the first that is not there. Counts as their use.

        What it yields belongs to the caller and does not change. It may fetch ahead of what is
        asked for by a few records, not by all.
        """

    @abstractmethod
    def has_many(self, keys: Sequence[bytes]) -> int:
        """How many of the first of `keys` are there. No use: it changes no order of eviction."""

    @abstractmethod
    def put_many(self, items: Sequence[tuple[bytes, bytes]], after: Sequence[bytes] = ()) -> None:
        """Write (key, record) pairs, over what is there.

        Keys are a chain, useless without those before: `after` are the ones before `items`. Where
        the back end is bounded, they count as used with these, the first as the last used, and
        are not dropped for them. Raises Full where there is no room.
        """

    @abstractmethod
    def delete(self, keys: Iterable[bytes]) -> None:
        """Forget records, those that are pinned too; a key that is not there is fine."""

    @abstractmethod
    def entries(self) -> Iterator[Entry]:
        """Every record that can be read now, in any order."""

    def held(self) -> int | None:
        """Bytes of all records; None where they would have to be counted."""
        return None


def make(url: str, options: dict[str, Any]) -> Backend:
    """The back end for `url`; of `options`, what is None is not passed on.

    Raises StoreError for a scheme nobody has, or an option that the back end does not take;
    MissingExtra where its package lacks.
    """
    scheme, separator, _ = url.partition("://")
    if not separator:
        raise StoreError(f"{url!r} is no URL of a store: write memory://, file:///var/kv, ...")
    cls = _find(scheme)
    takes = list(inspect.signature(cls).parameters)[1:]
    options = {name: value for name, value in options.items() if value is not None}
    for name, value in options.items():
        if name not in takes:
            reason = (cls.__doc__ or "").strip().partition("\n")[0]
            raise StoreError(f"{scheme}:// takes no {name}={value!r}. {reason}")
    return cls(url, **options)


def _find(scheme: str) -> type[Backend]:
    """Ours, one of an entry point, or what fsspec knows."""
    targets = {ep.name: ep.value for ep in entry_points(group=GROUP)} | BUILTIN
    if scheme not in targets:
        try:
            from fsspec import available_protocols
        except ImportError:
            theirs, note = [], " More with fsspec: pip install 'kvplug[store]'."
        else:
            theirs, note = available_protocols(), ""
        if scheme.partition("::")[0] not in theirs:
            note = f"Others register in entry-point group {GROUP!r}.{note}"
            raise StoreError(
                unknown("scheme of a store", scheme, sorted({*targets, *theirs}), note)
            )
    module, _, name = targets.get(scheme, REMOTE).partition(":")
    return getattr(load(module, f"a store at {scheme}://"), name)
