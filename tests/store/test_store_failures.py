"""`kvplug.Store` as callers see it: what cannot be is said at once, what fails later is a miss."""

import copy
import sys
import threading
import time

import pytest
import torch

import kvplug
from kvplug.store import behind, store
from kvplug.store.ahead import ahead
from kvplug.testing.store import chain

KEYS = chain(4)


def chunks():
    return ({"k": torch.full((1000,), i)} for i in range(len(KEYS)))


@pytest.mark.parametrize(
    ("url", "options", "text"),
    [
        ("/var/kv", {}, "'/var/kv' is no URL of a store: write memory://, file:///var/kv"),
        ("redi://x", {}, "unknown scheme of a store 'redi'. Did you mean 'redis'?"),
        ("file://var/kv", {}, "a folder is written file:///var/kv, with three slashes"),
        ("memory://name", {}, "memory:// takes no path"),
        ("memory://", {"policy": "lf"}, "unknown policy 'lf'. Did you mean 'lfu'?"),
        ("memory://", {"max_bytes": "4 elephants"}, "'4 elephants' is no size of memory"),
        ("memory://", {"ttl": 0}, "ttl=0: seconds, more than 0"),
        ("memory://", {"salt": 3}, "salt=3: a text"),
        ("redis://x", {"max_bytes": 5}, "takes no max_bytes=5. What bounds its records, and which"),
        ("redis://u:secret@x:port", {}, "redis-py cannot read this URL"),
        ("local:///x", {"ttl": 5}, "lifecycle rules of the bucket"),
    ],
)
def test_what_cannot_be_is_said_at_once(url, options, text):
    if url.startswith("redis:"):
        pytest.importorskip("redis")
    with pytest.raises(kvplug.KvplugError) as e:
        kvplug.Store(url, **options)
    assert text in str(e.value)
    assert isinstance(e.value, ValueError)
    assert "secret" not in str(e.value)


@pytest.mark.parametrize("url", ["redis://x", "local:///x"])
def test_a_missing_package_says_the_command(monkeypatch, url):
    for module in ("redis", "fsspec", "kvplug.store.redis", "kvplug.store.remote"):
        monkeypatch.delitem(sys.modules, module, raising=False)

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name in ("redis", "fsspec"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(kvplug.KvplugError, match=r"pip install 'kvplug\[store\]'"):
        kvplug.Store(url)


def test_one_store_per_url_and_process(tmp_path):
    url = tmp_path.as_uri()
    assert kvplug.store.open(url) is kvplug.store.open(url)
    mine = kvplug.Store(url)
    assert kvplug.store.open(mine) is copy.deepcopy(mine) is mine
    with pytest.raises(kvplug.StoreError, match=r"7 is no store: a URL, or a kvplug\.Store"):
        kvplug.store.open(7)


def test_passwords_are_not_shown():
    pytest.importorskip("redis")
    shown = kvplug.Store("redis://user:secret@localhost:1/0?password=secret")
    assert "secret" not in repr(shown) + str(shown.stats())
    assert "localhost:1/0" in repr(shown)


def test_a_bad_record_is_a_miss_once(caplog, tmp_path):
    mine = kvplug.Store(tmp_path.as_uri())
    for _ in range(2):
        mine.save(KEYS, chunks())
        path = mine._backend._path(KEYS[1])
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        assert len(list(mine.load(KEYS))) == 1
        assert not path.exists()  # so that it is written anew
    assert mine.stats()["misses"] == {"checksum": 6}
    assert len(caplog.records) == 1
    assert "has a bad record (checksum): computed" in caplog.text


def test_swapped_records_are_misses(tmp_path):
    mine = kvplug.Store(tmp_path.as_uri())
    mine.save(KEYS, chunks())
    a, b = (mine._backend._path(KEYS[i]) for i in (0, 1))
    a.rename(tmp_path / "c")
    b.rename(a)
    (tmp_path / "c").rename(b)
    assert list(mine.load(KEYS)) == []
    assert mine.stats()["misses"] == {"key": 4}


@pytest.fixture
def soon(monkeypatch):
    """A back end that has failed is asked again at once."""
    monkeypatch.setattr(store, "PAUSE", 0.0)


def test_a_folder_that_cannot_be(caplog, tmp_path, soon):
    (tmp_path / "file").write_text("in the way")
    mine = kvplug.Store((tmp_path / "file" / "kv").as_uri())
    for _ in range(2):
        assert list(mine.load(KEYS)) == []
        assert mine.has(KEYS) == 0
        mine.save(KEYS, chunks())
    assert mine.stats()["unsaved"] == {"NotADirectoryError": 8}
    assert mine.stats()["misses"] == {"absent": 8}
    assert len(caplog.records) == 1


def test_a_folder_that_is_removed_and_comes_back(tmp_path, soon):
    mine = kvplug.Store((tmp_path / "kv").as_uri())
    mine.save(KEYS, chunks())
    (tmp_path / "kv").rename(tmp_path / "elsewhere")
    assert list(mine.load(KEYS)) == []
    mine.save(KEYS, chunks())
    assert len(list(mine.load(KEYS))) == 4


def test_reading_makes_no_folder(tmp_path):
    mine = kvplug.Store((tmp_path / "kv").as_uri())
    assert (mine.has(KEYS), list(mine.load(KEYS)), list(mine.entries())) == (0, [], [])
    assert not (tmp_path / "kv").exists()
    assert set(mine.stats()["misses"]) == {"absent"}


def test_what_the_caller_gives_fails(caplog):
    mine = kvplug.Store("memory://")

    def broken():
        yield {"k": torch.zeros(2)}
        raise ZeroDivisionError("no chunk")

    mine.save(KEYS, broken())
    assert mine.stats()["unsaved"] == {"ZeroDivisionError": 3}
    assert mine.has(KEYS) == 1
    assert "a chunk cannot be saved: ZeroDivisionError: no chunk" in caplog.text
    mine.save(KEYS[1:], [{"k": torch.zeros(2).to_sparse()}] * 3)
    assert mine.has(KEYS) == 1


def test_a_back_end_that_failed_is_left_alone_for_a_while(tmp_path, monkeypatch):
    mine, asked = kvplug.Store(tmp_path.as_uri()), []

    def fail(keys):
        asked.append(len(keys))
        raise OSError("no such disk")

    monkeypatch.setattr(mine._backend, "get_many", fail)
    for _ in range(3):
        assert list(mine.load(KEYS)) == []
    mine.save(KEYS, chunks())
    assert len(asked) == 1
    assert mine.stats()["misses"] == {"OSError": 4, "paused": 8}
    assert mine.stats()["unsaved"] == {"paused": 4}
    monkeypatch.setattr(time, "monotonic", lambda: float("inf"))
    list(mine.load(KEYS))
    assert len(asked) == 2


def test_counts_want_their_reasons():
    mine = kvplug.Store("memory://")
    mine.count("reused_tokens", 64)
    mine.count("fallbacks", reason="images")
    mine.count("misses", 2, reason="shape")
    stats = mine.stats()
    assert stats["reused_tokens"] == 64
    assert (stats["fallbacks"], stats["misses"]) == ({"images": 1}, {"shape": 2})
    for name, reason in (("misses", None), ("hits", "why"), ("hit", None)):
        with pytest.raises(KeyError):
            mine.count(name, reason=reason)


def test_reading_ahead_is_ahead_by_two_and_ends_with_its_reader():
    read, closed = [], threading.Event()

    def source():
        try:
            for i in range(9):
                read.append(i)
                yield i
        finally:
            closed.set()

    items = ahead(source(), str, 2)
    assert next(items) == "0"
    end = time.monotonic() + 30
    while len(read) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.05)  # in which it does not read on
    assert read == [0, 1, 2]
    items.close()
    assert closed.wait(30)
    assert len(read) <= 4
    assert list(ahead(source(), str, 2)) == list(map(str, range(9)))

    def fails():
        yield 1
        raise OSError("in the thread")

    items = ahead(fails(), str, 3)
    assert next(items) == "1"
    with pytest.raises(OSError, match="in the thread"):
        next(items)
    items = ahead((x for x in (2, 1, 0, 1)), lambda x: 1 / x, 2)
    assert [next(items), next(items)] == [0.5, 1]
    with pytest.raises(ZeroDivisionError):
        next(items)


def test_writing_behind_is_in_order_waits_and_has_ended():
    written, go_on, wrote = [], threading.Event(), threading.Event()

    def work(n, last=False):
        assert threading.current_thread() is not threading.main_thread()
        assert go_on.wait(30)
        written.append(n)

    with behind(work, 2) as later:
        later(0)
        later(1)
        assert written == []
        held = threading.Thread(target=lambda: [later(2, last=True), wrote.set()])
        held.start()
        assert not wrote.wait(0.05)  # two wait already
        go_on.set()
        assert wrote.wait(30)
        held.join()
    assert written == [0, 1, 2]

    def fails(n):
        raise OSError("in the thread")

    with pytest.raises(OSError, match="in the thread"), behind(fails, 2) as later:
        later(1)
    with behind(written.append, 0) as now:
        now(3)
        assert written[-1] == 3


def test_a_server_that_is_gone_is_a_miss(caplog, soon):
    pytest.importorskip("redis")
    mine = kvplug.Store("redis://127.0.0.1:1/0")
    for _ in range(2):
        assert list(mine.load(KEYS)) == []
        mine.save(KEYS, chunks())
    assert mine.stats()["misses"] == {"ConnectionError": 8}
    assert mine.stats()["unsaved"] == {"ConnectionError": 8}
    assert len(caplog.records) == 2


def test_a_server_that_hangs_is_a_miss(server, soon):
    mine = kvplug.Store(server.url + "?socket_timeout=0.5")  # what a busy machine may take itself
    kvplug.Store(server.url).save(KEYS, chunks())
    loading = mine.load(KEYS)
    next(loading)
    server.pause()
    try:
        assert list(mine.load(KEYS)) == []
        mine.save(KEYS, chunks())
        assert set(mine.stats()["misses"]) == {"TimeoutError"}
        assert set(mine.stats()["unsaved"]) == {"TimeoutError"}
    finally:
        server.go_on()
    assert len(list(mine.load(KEYS))) == 4


def test_a_server_that_is_full_says_what_to_set(server, caplog):
    mine = kvplug.Store(server.url)
    server.fill()
    try:
        mine.save(KEYS, chunks())
        assert mine.stats()["unsaved"] == {"full": 4}
        assert "set maxmemory-policy allkeys-lru" in caplog.text
        assert list(mine.load(KEYS)) == []  # reading goes on: no pause
        assert mine.stats()["misses"] == {"absent": 4}
    finally:
        server.client.config_set("maxmemory", "0")
    mine.save(KEYS, chunks())
    assert len(list(mine.load(KEYS))) == 4


def test_others_in_the_same_server_are_left_alone(server):
    server.client.set("theirs", "x")
    mine = kvplug.Store(server.url)
    mine.save(KEYS, chunks())
    assert len(list(mine.entries())) == 4
    mine.clear()
    assert server.client.keys() == [b"theirs"]


def test_records_are_the_same_wherever_they_lie(server, tmp_path):
    """What one back end holds may be copied to another."""
    here, there = kvplug.Store(tmp_path.as_uri()), kvplug.Store(server.url)
    here.save(KEYS, chunks())
    there._backend.put_many(list(zip(KEYS, here._backend.get_many(KEYS), strict=True)))
    assert [x["k"][0] for x in there.load(KEYS)] == [0, 1, 2, 3]
