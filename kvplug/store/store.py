"""`kvplug.Store`: chunks of caches by key, whatever keeps them; no failure of it fails a call."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

from ..errors import StoreError
from ..units import bytes_of
from . import keys as keys_of
from . import record
from .ahead import ahead
from .backend import Full, make
from .metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Sequence

    from torch import Tensor

    from .backend import Entry

AHEAD = 2  # records fetched and verified before they are asked for
PAUSE = 5.0  # seconds in which a back end that failed is not asked again


class Store:
    """Keeps chunks of caches for later calls, other processes, other machines.

    Args:
        url: `memory://`, `file:///var/kv`, `redis://host:6379/0` (or `rediss://`, `unix://`), what
            fsspec knows (`s3://bucket/kv`, `gs://...`), or the scheme of a plugin.
        max_bytes: what all records together may take, a number or "4GiB"; None: no bound.
        policy: which records go first where the bound is reached: "lru" (the default), those used
            longest ago; "lfu", those used least.
        ttl: seconds that records live which this object writes; None: no end.
        salt: keys hold it. Who has another salt finds nothing of this one's: one for each tenant.
        compress: pack what `exact` stores by blosc2, 1.2 (float32) to 1.4 times smaller, at half a
            GB a second to write and two to read. What other codecs store is left as it is.

    `max_bytes` and `policy` are for `memory` and `file`, `ttl` for these and Redis: elsewhere the
    engine has options of its own. Raises
    StoreError for a URL or option that cannot be, MissingExtra where a package lacks. Nothing is
    connected or written before the first use.
    """

    def __init__(
        self,
        url: str,
        *,
        max_bytes: int | str | None = None,
        policy: str | None = None,
        ttl: float | None = None,
        salt: str = "",
        compress: bool = False,
    ) -> None:
        if ttl is not None and not ttl > 0:
            raise StoreError(f"ttl={ttl!r}: seconds, more than 0, or None")
        limit = None if max_bytes is None else bytes_of(max_bytes)
        keys_of.tag(salt)  # a salt that is no text is an error now
        if compress:
            record.blosc2_module()
        self.salt, self._compress = salt, compress
        self.url = re.sub(r"(?<=://)[^/@]*@", "***@", url.partition("?")[0])  # no passwords
        self._backend = make(url, {"max_bytes": limit, "policy": policy, "ttl": ttl})
        self._metrics = Metrics()
        self._asleep_until = 0.0

    def has(self, keys: Sequence[bytes]) -> int:
        """How many of the first of `keys` are stored; they may be gone, or bad, when loaded."""
        if self._asleep():
            return 0
        try:
            return self._backend.has_many(keys)
        except Exception as e:
            self._failed("read", e)
            return 0

    def load(self, keys: Sequence[bytes]) -> Generator[dict[str, Tensor]]:
        """The tensors of each of `keys` in order, on the CPU, until the first miss.

        Whatever is wrong with a record or the back end is a miss, counted, and logged once. The
        next records are fetched and verified meanwhile, in threads.
        """
        if self._asleep():
            return self.count("misses", len(keys), "paused")
        done = 0
        try:
            for tensors, size in ahead(self._fetch(keys), self._unpack, AHEAD):
                done += 1
                self.count("hits")
                self.count("bytes_read", size)
                yield tensors
            if done == len(keys):
                return None
            reason = "absent"
        except record.Bad as e:
            reason = e.reason
            self._metrics.say("bad", reason, f"{self.url} has a bad record ({reason}): computed")
            with suppress(Exception):
                self._backend.delete([keys[done]])  # or it would be found again
        except Exception as e:
            reason = self._failed("read", e)
        self.count("misses", len(keys) - done, reason)
        return None

    def save(
        self,
        keys: Sequence[bytes],
        chunks: Iterable[dict[str, Tensor]],
        after: Sequence[bytes] = (),
    ) -> None:
        """Write chunks, one for each of `keys`, up to the first that fails; never raises.

        Args:
            keys: of one chain, in order.
            chunks: tensors by name, on any device; taken one by one.
            after: keys of the chain before these. They count as used, and are not evicted for them.
        """
        with self._metrics.seconds("save_seconds"):
            reason, done = self._save(keys, iter(chunks), list(after))
        self.count("saved", done)
        if reason is not None:
            self.count("unsaved", len(keys) - done, reason)

    def delete(self, keys: Iterable[bytes]) -> None:
        """Forget these records, pinned ones too. Raises what the back end raises."""
        self._backend.delete(keys)

    def clear(self, salt: str | None = None) -> int:
        """Forget all records, or those of one salt; how many. Raises what the back end raises."""
        keys = [e.key for e in self.entries(salt)]
        self._backend.delete(keys)
        return len(keys)

    def entries(self, salt: str | None = None) -> Iterator[Entry]:
        """What is known of each record, or of each of one salt. Raises as the back end does."""
        mine = b"" if salt is None else keys_of.tag(salt)
        return (e for e in self._backend.entries() if e.key.startswith(mine))

    def verify(self, salt: str | None = None) -> Counter[str]:
        """Read all records, or those of one salt, and forget what is bad; how many of what kind.

        "good", or why not: "checksum", "truncated", ... It counts as their use. Raises what the
        back end raises.
        """
        found: Counter[str] = Counter()
        for e in list(self.entries(salt)):
            for data in self._backend.get_many([e.key]):
                try:
                    record.unpack(e.key, data)
                    found["good"] += 1
                except record.Bad as bad:
                    found[bad.reason] += 1
                    self._backend.delete([e.key])
        return found

    def pin(self, keys: Iterable[bytes], pinned: bool = True) -> None:
        """Keep records from being evicted, or let them go again; `ttl` ends them all the same.

        Raises StoreError where the back end does not evict by itself.
        """
        if not hasattr(self._backend, "pin"):
            raise StoreError(f"{self.url} evicts nothing by itself, so nothing can be pinned in it")
        self._backend.pin(keys, pinned)

    def count(self, name: str, n: float = 1, reason: str | None = None) -> None:
        """Count what the caller alone knows: see `kvplug.store.metrics` for the names."""
        self._metrics.count(name, n, reason)

    def stats(self) -> dict:
        """What this object did so far, in plain types: `kvplug.store.metrics` says what is what.

        `held_bytes` are those of all records, None where the back end would have to count.
        """
        held = None
        with suppress(Exception):
            held = self._backend.held()
        more = {"url": self.url, "held_bytes": held, "evicted": self._backend.evicted}
        return self._metrics.as_dict() | more

    def __deepcopy__(self, memo: dict) -> Store:
        return self  # generation configs are copied, with the store they name

    def __repr__(self) -> str:
        return f"kvplug.Store({self.url!r})"

    def _fetch(self, keys: Sequence[bytes]) -> Generator[tuple[bytes, bytes]]:
        """(key, record) of each of `keys` until the first that is not there."""
        records = iter(self._backend.get_many(keys))
        for key in keys:
            with self._metrics.seconds("load_seconds"):
                data = next(records, None)
            if data is None:
                return
            yield key, data

    def _unpack(self, item: tuple[bytes, bytes]) -> tuple[dict[str, Tensor], int]:
        """The tensors of a record, and its bytes. Raises as `record.unpack` does."""
        with self._metrics.seconds("verify_seconds"):
            return record.unpack(*item), len(item[1])

    def _save(
        self, keys: Sequence[bytes], chunks: Iterator[dict[str, Tensor]], chain: list[bytes]
    ) -> tuple[str | None, int]:
        """Why not all were written, and how many were."""
        if self._asleep():
            return "paused", 0
        for done, key in enumerate(keys):
            try:
                data = record.pack(key, next(chunks), self._compress)
            except Exception as e:  # the caller's, or a tensor that has no plain bytes
                reason = type(e).__name__
                self._metrics.say("pack", reason, f"a chunk cannot be saved: {reason}: {e}")
                return reason, done
            try:
                self._backend.put_many([(key, data)], chain)
            except Full as e:
                self._metrics.say("save", "full", f"{self.url} is full: {e}")
                return "full", done
            except Exception as e:
                return self._failed("written", e), done
            chain.append(key)
            self.count("bytes_written", len(data))
        return None, len(keys)

    def _failed(self, what: str, e: Exception) -> str:
        """Leave the back end alone for a while; the reason, to count."""
        reason = type(e).__name__
        self._asleep_until = time.monotonic() + PAUSE
        self._metrics.say(
            what,
            reason,
            f"{self.url} cannot be {what}: {reason}: {e}. What is missing is computed; tried again "
            f"{PAUSE:.0f} seconds after each failure",
        )
        return reason

    def _asleep(self) -> bool:
        return time.monotonic() < self._asleep_until


_open: dict[str, Store] = {}
_lock = threading.Lock()


def open(store: str | Store) -> Store:
    """The store of a URL, the same for all calls of this process; a Store is what it is.

    Raises as Store does, and StoreError for what is neither.
    """
    if isinstance(store, Store):
        return store
    if not isinstance(store, str):
        raise StoreError(f"{store!r} is no store: a URL, or a kvplug.Store")
    with _lock:
        if store not in _open:
            _open[store] = Store(store)
        return _open[store]
