"""What a bounded store keeps: against a reference simulation, and with several processes."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from forked import ended, start
from hypothesis import given, settings
from hypothesis import strategies as st

import kvplug
from kvplug.store import Full
from kvplug.store.files import LEFT
from kvplug.testing.store import chain

WRITES = int(os.environ.get("KVPLUG_STORE_WRITES", "600"))


class Reference:
    """The policy in a dozen lines: all is sorted anew whenever something must go."""

    def __init__(self, bound, policy):
        self.bound, self.policy, self.clock = bound, policy, 0
        self.size, self.used, self.hits, self.pinned = {}, {}, {}, set()

    def touch(self, keys):
        for key in reversed(keys):  # the first of a chain is the last used
            self.clock += 1
            if key in self.size:
                self.used[key] = self.clock

    def get(self, keys):
        n = next((i for i, key in enumerate(keys) if key not in self.size), len(keys))
        for key in keys[:n]:
            self.hits[key] += 1
        self.touch(keys[:n])
        return n

    def put(self, key, size, after):
        rank = {"lru": self.used.get, "lfu": lambda k: (self.hits[k], self.used[k])}[self.policy]
        others = [k for k in sorted(self.size, key=rank) if k not in {*after, key, *self.pinned}]
        held = sum(n for k, n in self.size.items() if k != key)
        if held + size - sum(self.size[k] for k in others) > self.bound:
            raise Full
        for k in others:
            if held + size > self.bound:
                held -= self.size.pop(k)
        self.size[key] = size
        self.hits.setdefault(key, 0)
        self.hits = {k: n for k, n in self.hits.items() if k in self.size}
        self.touch([*after, key])


# conversations that share what they begin with: (which, how many turns), and what is done
CONVERSATIONS = [chain(9, seed=n) for n in range(4)]
for branch in (1, 2):
    CONVERSATIONS[branch] = CONVERSATIONS[0][: 2 * branch] + CONVERSATIONS[branch][2 * branch :]
STEP = st.tuples(
    st.integers(0, 3), st.integers(0, 9), st.sampled_from(["turn"] * 5 + ["pin", "go"])
)


@pytest.mark.parametrize("scheme", ["memory", "file"])
@pytest.mark.parametrize("policy", ["lru", "lfu"])
@settings(deadline=None, max_examples=25)
@given(steps=st.lists(STEP, max_size=25), bound=st.integers(30, 200))
def test_a_replayed_trace_evicts_what_the_reference_does(
    tmp_path_factory, scheme, policy, steps, bound
):
    url = "memory://" if scheme == "memory" else tmp_path_factory.mktemp("kv").as_uri()
    store = kvplug.Store(url, max_bytes=bound, policy=policy)
    backend, reference = store._backend, Reference(bound, policy)
    for which, turns, what in steps:
        keys = CONVERSATIONS[which][:turns]
        if what != "turn":
            store.pin(keys, what == "pin")
            there = [key for key in keys if key in reference.size]
            reference.pinned = reference.pinned.union(there) if what == "pin" else (
                reference.pinned.difference(keys)
            )  # fmt: skip
            continue
        done = len(list(backend.get_many(keys)))
        assert done == reference.get(keys)
        for i in range(done, len(keys)):
            size = 5 + keys[i][-1] % 20
            try:
                reference.put(keys[i], size, keys[:i])
            except Full:
                with pytest.raises(Full, match=f"{size} bytes do not fit into max_bytes={bound}"):
                    backend.put_many([(keys[i], b"x" * size)], keys[:i])
                break
            backend.put_many([(keys[i], b"x" * size)], keys[:i])
        found = {e.key: (e.size, e.hits, e.pinned) for e in store.entries()}
        assert found == {
            k: (n, reference.hits[k], k in reference.pinned) for k, n in reference.size.items()
        }
        assert sum(e.size for e in store.entries()) <= bound


def test_a_chain_longer_than_the_store_keeps_its_beginning():
    store, keys = kvplug.Store("memory://", max_bytes="10 KiB"), chain(20)
    store.save(keys, ({"k": torch.zeros(250)} for _ in keys))  # more than 1,000 bytes each
    assert store.has(keys) == store.stats()["saved"] == 8
    assert store.stats()["unsaved"] == {"full": 12}
    other = chain(3, seed=1)
    store.save(other, ({"k": torch.zeros(250)} for _ in other))
    assert (store.has(other), store.has(keys)) == (3, 5)  # its end went
    assert store.stats()["evicted"] == 3


def on_disk(folder):
    """Bytes of records."""
    return sum(p.stat().st_size for p in Path(folder).glob("*/*.kv"))


def test_four_writers_keep_the_bound(tmp_path):
    """`KVPLUG_STORE_WRITES=10000` is the long version."""
    url, bound = tmp_path.as_uri(), 100_000

    def write(number):
        store, draw, i = kvplug.Store(url, max_bytes=bound), random.Random(number), 0
        while store.stats()["saved"] < WRITES / 4:
            i += 1
            keys = chain(6, seed=draw.randrange(8))
            done = len(list(store.load(keys)))
            rest = [{"k": torch.full((draw.randrange(2000),), i)} for _ in keys[done:]]
            store.save(keys[done:], rest, after=keys[:done])
        return store.stats()

    children = [start(lambda n=n: write(n)) for n in range(4)]
    index, most = kvplug.Store(url, max_bytes=bound)._backend._index, 0
    while not (tmp_path / "index.sqlite").exists():
        time.sleep(0.01)
    looks, end = 0, time.monotonic() + 30
    while looks < WRITES / 10 or (most <= 0.5 * bound and time.monotonic() < end):
        looks += 1
        with index._transaction():  # nobody enters or drops one while they are counted
            most = max(most, on_disk(tmp_path))
        time.sleep(0.01)
    stats = [eval(ended(*child, seconds=600)[1]) for child in children]
    assert 0.5 * bound < most <= bound
    assert sum(x["saved"] for x in stats) >= WRITES
    for of_one in stats:
        assert set(of_one["misses"]) <= {"absent"}
        assert of_one["unsaved"] == {}
    store = kvplug.Store(url)
    entries = list(store.entries())
    assert sum(e.size for e in entries) == on_disk(tmp_path) <= bound
    assert all(len(list(store.load([e.key]))) == 1 for e in entries)


def test_what_is_written_anew_leaves_the_disk_first(tmp_path, monkeypatch):
    backend, (key,) = kvplug.Store(tmp_path.as_uri(), max_bytes=100)._backend, chain(1)
    backend.put_many([(key, b"x" * 90)])
    seen, write = [], backend._write
    monkeypatch.setattr(backend, "_write", lambda *x: seen.append(on_disk(tmp_path)) or write(*x))
    backend.put_many([(key, b"y" * 80)])
    assert (seen, on_disk(tmp_path)) == ([0], 80)


def test_writers_that_are_killed_leave_no_bad_record(tmp_path):
    url, keys = tmp_path.as_uri(), chain(8)

    def write():
        torch.set_num_threads(1)  # threads of the parent's pool are not here
        store = kvplug.Store(url, max_bytes="5MB")
        while True:
            store.save(keys, ({"k": torch.zeros(60_000)} for _ in keys))

    for i in range(8):
        child, reader = start(write)
        end = time.monotonic() + 60
        while not (tmp_path / "tmp").exists() and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.04 + 0.007 * i)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
    (tmp_path / "tmp" / "half").write_bytes(b"x")  # as where none was killed in the middle
    for left in (tmp_path / "tmp").iterdir():
        os.utime(left, (1, time.time() - LEFT - 1))
    store = kvplug.Store(url)
    for key in keys:
        list(store.load([key]))
    assert set(store.stats()["misses"]) <= {"absent"}
    store.save(keys, ({"k": torch.ones(9)} for _ in keys))
    assert list((tmp_path / "tmp").iterdir()) == []
    assert len(list(store.load(keys))) == len(keys)


@pytest.mark.parametrize("harm", ["gone", "garbage", "cut"])
def test_an_index_that_is_lost_is_made_anew(tmp_path, harm):
    url, keys = tmp_path.as_uri(), chain(4)
    store = kvplug.Store(url)
    store.save(keys, ({"k": torch.zeros(9)} for _ in keys))
    index = tmp_path / "index.sqlite"
    other = kvplug.Store(url, max_bytes=5000)
    if harm == "gone":
        for path in tmp_path.glob("index*"):
            path.unlink()
    else:
        store._backend._index._db.close()  # writes the log into the file
        index.write_bytes(b"no database" * 999 if harm == "garbage" else index.read_bytes()[:5000])
        for path in tmp_path.glob("index.sqlite-*"):
            path.unlink()
    list(other.load(keys))  # may be a miss; the next is none
    assert len(list(kvplug.Store(url).load(keys))) == 4
    assert sum(e.size for e in other.entries()) == on_disk(tmp_path)


def test_a_record_that_somebody_deleted_is_a_miss(tmp_path):
    store, keys = kvplug.Store(tmp_path.as_uri()), chain(3)
    store.save(keys, ({"k": torch.zeros(9)} for _ in keys))
    store._backend._path(keys[1]).unlink()
    assert len(list(store.load(keys))) == 1
    assert store.has(keys) == 3  # young: it might be on its way
    store.save(keys[1:2], [{"k": torch.zeros(9)}])
    assert len(list(store.load(keys))) == 3
