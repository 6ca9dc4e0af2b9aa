"""`redis://`, `rediss://`, `unix://`: records in a Redis or Valkey server, by redis-py."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ..errors import StoreError
from .backend import Backend, Entry, Full

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

PREFIX = b"kvplug:"  # of all names, in a server that others use as well
AT_ONCE = 4  # records fetched by one MGET
MANY = 1000  # names in one message
LARGEST = 512 << 20  # bytes of a value, the server's own limit
# What a call may lose to a server that is gone or hangs, before all of it is computed: twice 1
# second. Options in the URL win: redis://host?socket_timeout=5
OPTIONS = {
    "socket_timeout": 1.0,
    "socket_connect_timeout": 1.0,
    "socket_read_size": 1 << 20,
    "retry": Retry(NoBackoff(), 1),  # the connection of a server that was started anew
}


class Redis(Backend):
    """What bounds its records, and which go first, is the server's: maxmemory, maxmemory-policy.

    Names are `kvplug:` and the key in hex. A server that is full refuses to write by default.
    """

    def __init__(self, url: str, ttl: float | None = None) -> None:
        try:
            self._server = redis.Redis.from_url(url, **OPTIONS)
        except ValueError as e:  # its text may quote the URL, with a password
            raise StoreError(
                "redis-py cannot read this URL: write redis://[[user]:password@]host:6379/0, "
                "rediss://... or unix:///path"
            ) from e
        self._ttl = None if ttl is None else max(1, round(ttl * 1000))  # milliseconds

    def get_many(self, keys: Sequence[bytes]) -> Iterator[bytes]:
        for part in _parts(keys, AT_ONCE):
            for record in self._server.mget(part):
                if record is None:
                    return
                yield record

    def has_many(self, keys: Sequence[bytes]) -> int:
        pipe = self._server.pipeline(transaction=False)
        for name in map(_name, keys):
            pipe.exists(name)
        found = pipe.execute()
        return found.index(0) if 0 in found else len(found)

    def put_many(self, items: Sequence[tuple[bytes, bytes]], after: Sequence[bytes] = ()) -> None:
        pipe = self._server.pipeline(transaction=False)
        for key, record in items:
            if len(record) > LARGEST:
                raise Full(f"a record of {len(record)} bytes: a value of Redis has {LARGEST}")
            pipe.set(_name(key), record, px=self._ttl)
        for part in _parts(after[::-1], MANY):
            pipe.touch(*part)
        try:
            pipe.execute()
        except redis.exceptions.OutOfMemoryError as e:
            raise Full(
                "the server has reached its maxmemory and may evict nothing: set maxmemory-policy "
                "allkeys-lru (its default, noeviction, refuses to write), or give it more"
            ) from e

    def delete(self, keys: Iterable[bytes]) -> None:
        for part in _parts(list(keys), MANY):
            self._server.unlink(*part)

    def entries(self) -> Iterator[Entry]:
        names, now = list(self._server.scan_iter(PREFIX + b"*", count=MANY)), time.time()
        keys = {bytes.fromhex(name[len(PREFIX) :].decode()) for name in names}
        for part in _parts(sorted(keys), MANY):
            pipe = self._server.pipeline(transaction=False)
            for name in part:
                pipe.strlen(name)
                pipe.pttl(name)
            found = pipe.execute()
            for name, size, left in zip(part, found[::2], found[1::2], strict=True):
                if left != -2:  # gone meanwhile
                    expires = now + left / 1000 if left >= 0 else None
                    yield Entry(bytes.fromhex(name[len(PREFIX) :].decode()), size, expires=expires)


def _name(key: bytes) -> bytes:
    return PREFIX + key.hex().encode()


def _parts(keys: Sequence[bytes], n: int) -> Iterator[list[bytes]]:
    """Names of `keys`, `n` at a time."""
    return ([_name(key) for key in keys[i : i + n]] for i in range(0, len(keys), n))
