"""`generate` beside stores that are real: shared, ended, attacked; no answer is another for it."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from asked import answer, equal, rows
from forked import start
from fresh import fresh

import kvplug
from kvplug import prefix
from kvplug.testing.specs import BUILTIN
from kvplug.testing.tools import prompt

# 100: how often writers are killed where somebody has the minutes
KILLED = int(os.environ.get("KVPLUG_KILLED_WRITERS", "6"))
INT4 = "int4(block=8, tail=8)"
BATCHES = {
    "one row": ([45], {}),
    "left-padded batch of 4": ([45, 52, 44, 47], {}),
    "beams": ([45], {"num_beams": 3}),
}


@pytest.mark.parametrize(
    ("batch", "spec"),
    [
        *((name, "exact(block=8)+host") for name in BATCHES),
        *((name, INT4) for name in BATCHES),
        ("one row", "int8(block=8)+disk"),
    ],
)
@pytest.mark.parametrize("kind", ["redis", "fsspec"])
def test_warm_is_cold_from_engines_of_others(model, kind, batch, spec, tmp_path, request):
    """As from memory and files, in `test_prefix`."""
    if kind == "redis":
        url = request.getfixturevalue("server").url
    else:
        pytest.importorskip("fsspec")
        url = f"local://{tmp_path}/kv"
    lengths, kwargs = BATCHES[batch]
    store, inputs = kvplug.Store(url), rows(*lengths)
    cold = answer(model, inputs, spec, {"store": store}, **kwargs)
    assert (store.stats()["reused_tokens"], store.stats()["unsaved"]) == (0, {})
    again = kvplug.Store(url)  # as another process has
    assert equal(answer(model, inputs, spec, {"store": again}, **kwargs), cold)
    assert again.stats()["reused_tokens"] >= 32 * len(lengths)
    alone = {"store": kvplug.Store("memory://")}
    assert equal(answer(model, inputs, spec, alone, **kwargs), cold)


@pytest.mark.parametrize("codec", BUILTIN["codec"])
def test_warm_is_cold_for_every_codec(model, codec):
    tail = "" if codec == "exact" else ", tail=3"
    store, spec, inputs = kvplug.Store("memory://"), f"{codec}(block=8{tail})", rows(61)
    cold = answer(model, inputs, spec, {"store": store})
    assert equal(answer(model, inputs, spec, {"store": store}), cold)
    assert store.stats()["reused_tokens"] >= 32


def test_nothing_is_read_by_the_place_of_its_name(model, monkeypatch):
    """Who packs a record may name its tensors in any order; files have them in any."""
    load, draw = kvplug.Store.load, random.Random(0)

    def shuffled(self, keys):
        for tensors in load(self, keys):
            names = list(tensors)
            draw.shuffle(names)
            yield {name: tensors[name] for name in names}

    for spec in ("exact(block=8)", INT4, "int8(block=8)+reference", "fp8(block=8)"):
        store, inputs = kvplug.Store("memory://"), rows(61)
        cold = answer(model, inputs, spec, {"store": store})
        monkeypatch.setattr(kvplug.Store, "load", shuffled)
        for _ in range(3):
            assert equal(answer(model, inputs, spec, {"store": store}), cold), spec
        monkeypatch.undo()
        assert store.stats()["reused_tokens"] >= 3 * 32


@pytest.mark.parametrize("harm", ["ended", "paused", "filled"])
def test_a_server_that_fails_in_the_middle_of_a_call(model, own_server, harm):
    """It has given one chunk of two that it has; two are to be saved."""
    pytest.importorskip("redis")
    inputs, half = rows(90), {"input_ids": rows(90)["input_ids"][:, :50]}
    cold = answer(model, inputs, INT4, {"store": kvplug.Store("memory://")})
    answer(model, half, INT4, {"store": kvplug.Store(own_server.url)})
    store = kvplug.Store(own_server.url + "?socket_timeout=0.1")
    harms = {"ended": own_server.close, "paused": own_server.pause, "filled": own_server.fill}
    get_many = store._backend.get_many

    def until_harmed(keys):
        records = get_many(keys[:1])
        yield next(records)
        harms[harm]()
        yield from get_many(keys[1:])

    store._backend.get_many = until_harmed
    assert equal(answer(model, inputs, INT4, {"store": store}), cold)
    stats = store.stats()
    if harm == "filled":  # what is there can be read
        assert (stats["hits"], stats["unsaved"]) == (2, {"full": 2})
    else:
        assert stats["hits"] == 1
        assert set(stats["misses"]) <= {"ConnectionError", "TimeoutError"}
        assert set(stats["unsaved"]) == {"paused"}
    own_server.go_on()
    store._backend.get_many = get_many
    assert equal(answer(model, inputs, INT4, {"store": store}), cold)


@pytest.mark.parametrize("kind", ["memory", "file", "redis"])
def test_what_is_planted_with_one_tenant_is_in_no_answer_of_another(
    model, kind, tmp_path, request, monkeypatch
):
    """Chunks of tenant a are made wrong, so that its answers show that they were read."""
    if kind == "redis":
        store = kvplug.Store(request.getfixturevalue("server").url)
    else:
        store = kvplug.Store("memory://" if kind == "memory" else tmp_path.as_uri())
    inputs, spec = rows(45), "exact(block=8)"
    right = answer(model, inputs)[0]
    chunk_of = prefix.chunk_of

    def planted(*chunk):
        return {name: -x for name, x in chunk_of(*chunk).items()}

    monkeypatch.setattr(prefix, "chunk_of", planted)
    answer(model, inputs, spec, {"store": store, "salt": "a"})
    monkeypatch.undo()
    marked = answer(model, inputs, spec, {"store": store, "salt": "a"})[0]
    assert store.stats()["hits"] == 2
    assert not torch.equal(marked, right)
    for salt in ("b", "", "A", "a ", "b"):
        assert torch.equal(answer(model, inputs, spec, {"store": store, "salt": salt})[0], right)
    assert store.stats()["hits"] == 2 + 2  # of b, its own


def test_writers_that_are_killed_while_they_generate(model, tmp_path):
    """Four at once, again and again: who reads then finds whole chunks, or none."""
    url, prompts = tmp_path.as_uri(), [{"input_ids": prompt(90, seed=n)} for n in range(4)]
    cold = [answer(model, x, INT4, {"store": kvplug.Store("memory://")}) for x in prompts]

    def write():
        torch.set_num_threads(1)  # threads of the parent's pool are not here
        store = kvplug.Store(url)
        while True:
            for x in prompts:
                answer(model, x, INT4, {"store": store}, max_new_tokens=1)
            store.clear()

    draw, store = random.Random(0), kvplug.Store(url)
    for _ in range(KILLED):
        children = [start(write) for _ in range(4)]
        end = time.monotonic() + 60
        while not any(tmp_path.glob("*/*.kv")) and time.monotonic() < end:
            time.sleep(0.01)
        for child, reader in children:
            time.sleep(0.03 * draw.random())
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reader)
        for x, expected in zip(prompts, cold, strict=True):
            assert equal(answer(model, x, INT4, {"store": store}), expected)
        assert set(store.stats()["misses"]) <= {"absent"}
    assert store.stats()["saved"] > 0
    before = store.stats()["hits"]
    for x, expected in zip(prompts, cold, strict=True):
        assert equal(answer(model, x, INT4, {"store": store}), expected)
    assert store.stats()["hits"] == before + 16


def test_a_document_asked_by_processes_that_share_a_server(server, tmp_path):
    """The example, as two people would run it."""
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy.\n" * 20)
    examples = str(Path(__file__).parents[2] / "examples")
    found = []
    for question in ("Who?", "Why is that so?"):
        arguments = [question, "--tiny", "--file", str(text), "--store", server.url]
        code = (
            "import runpy, sys, torch\n"
            "torch.set_num_threads(1)\n"
            f"sys.argv += {arguments}\n"
            f"runpy.run_path({examples + '/ask_document.py'!r}, run_name='__main__')\n"
        )
        found.append(fresh(code, path=[examples]).stdout.split()[0])
    assert found == ["0", "772"]  # three chunks of 256 after the first 4
