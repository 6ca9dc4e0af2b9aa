"""The contract of a back end of `kvplug.Store`."""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING

import pytest
import torch

from ..errors import StoreError
from ..store import Store, keys
from .tools import normal, same

if TYPE_CHECKING:
    from ..store import Backend

LARGE = 3 << 20  # bytes of a record that no engine sends in one piece


def chain(n: int, salt: str = "", seed: int = 0) -> list[bytes]:
    """Keys of `n` chunks of one token."""
    root = keys.tag(salt) + hashlib.sha256(b"%d" % seed).digest()[keys.TAG :]
    return keys.chain(root, range(n), 1)


class StoreConformance:
    """The contract of `kvplug.store.Backend`. Override the fixture `url`, of an empty store."""

    @pytest.fixture
    def url(self) -> str:
        """What `kvplug.Store` is given."""
        raise NotImplementedError("override the fixture 'url'")

    @pytest.fixture
    def store(self, url: str) -> Store:
        """A store over it."""
        return Store(url)

    @pytest.fixture
    def backend(self, store: Store) -> Backend:
        """The back end under test."""
        return store._backend

    def test_what_is_put_is_got_in_order(self, backend: Backend) -> None:
        """Bytes of any content, none, and many."""
        mine = chain(5)
        records = [b"", b"\0\r\n\xff", b"x", bytes(range(256)) * (LARGE // 256), b"\n"]
        backend.put_many(list(zip(mine, records, strict=True)))
        assert [bytes(x) for x in backend.get_many(mine)] == records
        assert [bytes(x) for x in backend.get_many(mine[::-1])] == records[::-1]

    def test_the_first_miss_ends_it(self, backend: Backend) -> None:
        """What lies behind is not given."""
        mine = chain(4)
        assert list(backend.get_many(mine)) == []
        assert backend.has_many(mine) == 0
        backend.put_many([(mine[i], b"%d" % i) for i in (0, 1, 3)])
        assert [bytes(x) for x in backend.get_many(mine)] == [b"0", b"1"]
        assert backend.has_many(mine) == 2
        assert backend.has_many(mine[3:]) == 1
        assert list(backend.get_many([])) == []
        assert backend.has_many([]) == 0

    def test_many_at_once(self, backend: Backend) -> None:
        """More than any engine takes in one message, and `after` that names what is not there."""
        mine = chain(300)
        backend.put_many([(key, key * 3) for key in mine[100:]], after=mine[:100])
        assert backend.has_many(mine[100:]) == 200
        assert [bytes(x) for x in backend.get_many(mine[100:])] == [k * 3 for k in mine[100:]]

    def test_put_again_replaces(self, backend: Backend) -> None:
        """The newest is what is there, shorter or longer."""
        (key,) = chain(1)
        for record in (b"first", b"2", b"the third"):
            backend.put_many([(key, record)])
            assert [bytes(x) for x in backend.get_many([key])] == [record]
            assert [(e.key, e.size) for e in backend.entries()] == [(key, len(record))]

    def test_delete(self, backend: Backend) -> None:
        """Only what is named; twice is fine."""
        mine = chain(3)
        backend.put_many([(key, b"x") for key in mine])
        backend.delete(iter(mine[1:]))
        backend.delete(mine[1:])
        backend.delete([])
        assert backend.has_many(mine) == 1
        assert [e.key for e in backend.entries()] == mine[:1]

    def test_entries(self, backend: Backend) -> None:
        """Keys and sizes of all; what else is known is of the right kind."""
        assert list(backend.entries()) == []
        mine = chain(40)
        backend.put_many([(key, b"x" * i) for i, key in enumerate(mine, 1)])
        found = list(backend.entries())
        assert {e.key: e.size for e in found} == {key: i for i, key in enumerate(mine, 1)}
        assert len(found) == 40
        for e in found:
            assert e.created is None or e.created > 1.7e9
            assert e.expires is None

    def test_what_was_got_does_not_change(self, backend: Backend) -> None:
        """Not by writing over it, nor by deleting it."""
        (key,) = chain(1)
        backend.put_many([(key, b"a" * LARGE)])
        got = backend.get_many([key])
        record = next(got)
        backend.put_many([(key, b"b" * LARGE)])
        backend.delete([key])
        assert bytes(record) == b"a" * LARGE

    def test_a_second_object_sees_it(self, url: str, backend: Backend) -> None:
        """As another process does. Not for stores that end with their object."""
        mine = chain(2)
        backend.put_many([(key, b"x") for key in mine])
        other = Store(url)._backend
        if type(other).private:
            pytest.skip(f"{url} is of one object")
        assert other.has_many(mine) == 2
        other.delete(mine)
        assert backend.has_many(mine) == 0

    def test_threads(self, backend: Backend) -> None:
        """Four that write, read and delete the same keys: each reads whole records, or pieces
        where the back end says so, and nothing else happens.
        """
        mine, wrong = chain(6), []

        def work(number: int) -> None:
            try:
                for i in range(12):
                    word = b"%d" % (number * 12 + i)
                    backend.put_many([(key, word * 5000) for key in mine])
                    for record in map(bytes, backend.get_many(mine)):
                        whole = record == record[: len(record) // 5000] * 5000
                        if backend.atomic and not whole:
                            wrong.append(record[:9])
                    backend.delete(mine[number:])
            except Exception as e:
                wrong.append(e)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_ttl(self, url: str) -> None:
        """Records end, or the option is refused by name."""
        try:
            short, mine = Store(url, ttl=0.2), chain(2)
        except StoreError as e:
            assert "takes no ttl" in str(e)  # noqa: PT017
            return
        short._backend.put_many([(key, b"x") for key in mine])
        assert short._backend.has_many(mine) == 2
        threading.Event().wait(0.3)
        assert short._backend.has_many(mine) == 0
        assert list(short._backend.get_many(mine)) == []
        assert list(short._backend.entries()) == []

    def test_tensors_come_back(self, store: Store) -> None:
        """Through `Store`: every dtype bit for bit, by name, and counted."""
        mine = chain(3)
        chunks = [
            {
                "v": normal(2, 3, 4, seed=i),
                "k": normal(2, 3, 4, seed=i, dtype=torch.bfloat16),
                "codes": torch.arange(24, dtype=torch.uint8).view(2, 3, 4),
                "none": torch.empty(2, 0, 4),
            }
            for i in range(3)
        ]
        assert list(store.load(mine)) == []
        store.save(mine, chunks)
        assert store.has(mine) == 3
        got = list(store.load([*mine, *chain(1, "other")]))
        assert len(got) == 3
        for a, b in zip(got, chunks, strict=True):
            assert list(a) == ["codes", "k", "none", "v"]
            assert all(same(a[name], b[name]) for name in b)
        stats = store.stats()
        assert (stats["hits"], stats["saved"], stats["unsaved"]) == (3, 3, {})
        assert stats["misses"] == {"absent": 4}
        assert stats["bytes_read"] == stats["bytes_written"] > 0

    def test_a_salt_of_ones_own(self, store: Store) -> None:
        """Keys of another salt are others, and are cleared alone."""
        ours, theirs = chain(3, "a"), chain(2, "b")
        for mine in (ours, theirs):
            store.save(mine, ({"k": torch.zeros(1)} for _ in mine))
        assert store.clear("b") == 2
        assert (store.has(ours), store.has(theirs)) == (3, 0)
        assert store.clear() == 3
        assert list(store.entries()) == []
