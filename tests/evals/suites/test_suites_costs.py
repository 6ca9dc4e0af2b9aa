"""Suites end to end on a tiny model: decode, kernel, memory, drift, prefill, prefix and replay."""

import itertools
import time
from dataclasses import replace
from importlib.util import find_spec
from unittest import mock

import pytest
import tiny_run
from transformers import cache_utils

import kvplug
from evals import suites
from evals.measure import energy
from evals.measure.bits import exact_states
from evals.measure.clock import step
from evals.rows.schema import Row, measured
from evals.setup.contenders import EXACT, resolve
from evals.suites import encode
from kvplug.testing.server import binary

pytestmark = pytest.mark.usefixtures("offline")

# newer than the oldest transformers
FP8 = ("transformers:fp8",) if hasattr(cache_utils, "Fp8QuantizedLayer") else ()


def start(config, tmp_path, console, ok=True):
    folder, rows = tiny_run.measured(config, tmp_path / "out", console, ok)
    assert all(set(row) == set(Row.__annotations__) for row in rows)
    return rows, (folder / "table.md").read_text()


def test_decode_end_to_end(config, tmp_path, console, add_rival):
    add_rival("failing:card", "def build(config, length):\n    raise RuntimeError('no card')\n")
    rows = ("growing", "int8", "transformers:static", *FP8, "failing:card")
    config = replace(config, suite="decode", strategies=rows, context=(48, 160, 5000), batch=(1, 2))
    rows, table = start(config, tmp_path, console, ok=False)
    figure = {(r["strategy"], r["metric"], r["batch"], r["context"]): r for r in rows}
    limit = 1024 - config.warmup - config.decode_steps
    for name in (EXACT, "growing", "int8", *FP8, "control:same"):
        for batch in (1, 2):
            for context in (48, 160, limit):
                row = figure[name, "decode", batch, context]
                assert row["n"] == config.repeats * config.decode_steps
                assert row["p20"] <= row["value"] <= row["p80"] <= row["p99"]
                assert figure[name, "speedup", batch, context]["n"] == config.repeats
                for metric in ("decode_new", "throughput", "floor", "floor_share", "bytes_held"):
                    assert (name, metric, batch, context) in figure
    assert "5,000 tokens asked, 1,019 fit the model's 1,024 positions" in table
    assert figure[EXACT, "speedup", 1, 48]["value"] == 1
    assert figure[EXACT, "decode", 2, 0]["value"] > 0, "the step without context"
    floors = [figure[name, "floor", 2, limit]["value"] for name in (EXACT, "int8")]
    assert floors[0] > floors[1]
    assert figure["int8", "decode", 1, 160]["stats"]["kernels"]
    failed = [row for row in rows if row["status"] == "failed"]
    assert {row["strategy"] for row in failed} == {"failing:card"}
    assert len(failed) == 6, "one per batch and context; the others went on"
    assert "share of the predicted floor" in table
    shown = console.file.getvalue()
    assert shown.index("predicted floor, ms/token") < shown.index("tasks"), "before measuring"


def test_decode_names_who_is_slow_at_lengths_that_are_new():
    """A loop that repeats lengths hides what a library does once for each."""
    place = {"batch": 1, "context": 4096}
    timed = [measured("decode", x) | {"strategy": s} | place for s, x in (("a", 20.0), ("b", 21.0))]
    news = [
        measured("decode_new", x) | {"strategy": s} | place for s, x in (("a", 62.0), ("b", 22))
    ]
    (line,) = suites.get("decode").slower_when_new(timed, news)
    assert line.endswith("ms/token: a 62.0 at 1 x 4,096.")
    assert suites.get("decode").slower_when_new(timed, news[1:]) == []


def test_decode_counts_joules_where_the_machine_does(config, tmp_path, console, monkeypatch):
    monkeypatch.setattr(energy, "meter", lambda device: itertools.count(0, 6).__next__)
    config = replace(config, suite="decode", strategies=("growing",), context=(40,), batch=(2,))
    rows, table = start(config, tmp_path, console)
    used = {r["strategy"]: r["value"] for r in rows if r["metric"] == "energy"}
    # six joules from one reading to the next
    expected = 6 / (config.decode_steps * 2)
    assert used == dict.fromkeys(("transformers:dynamic", "growing", "control:same"), expected)
    assert "energy, J/token ↓, batch 2" in table


def test_decode_says_which_caches_do_not_fit(config, tmp_path, console, monkeypatch):
    monkeypatch.setattr("evals.measure.memory.free_bytes", lambda device: 780_000)
    config = replace(config, suite="decode", strategies=("int8",), context=(512,))
    rows, _ = start(config, tmp_path, console)
    said = {row["strategy"]: row["note"] for row in rows if row["value"] is None}
    assert set(said) == {EXACT, "control:same"}
    assert said[EXACT].startswith("does not fit: needs 0.00 GB")


def test_kernel_end_to_end(config, tmp_path, console, monkeypatch):
    kernel = suites.get("kernel")
    monkeypatch.setattr(kernel, "HEADS", (kernel.Heads(2, 3, 16),))
    monkeypatch.setattr(kernel, "LAYERS", 3)
    monkeypatch.setattr(kernel, "EVICT", 1 << 16)
    monkeypatch.setattr("evals.setup.model.load", lambda *_: pytest.fail("it needs no model"))
    rows = ("int8", "int4(tail=0)+reference")
    config = replace(config, suite="kernel", strategies=rows, context=(96, 200), repeats=3)
    rows, table = start(config, tmp_path, console)
    figure = {(r["strategy"], r["metric"], r["context"], r["case"]): r for r in rows}
    case = "2 kv heads x 3 queries, D 16, "
    for name in ("torch:sdpa-float32", "torch:sdpa-bfloat16", "int8+reference", "control:same"):
        for context in (96, 200):
            for state in ("warm", "cold"):
                row = figure[name, "attention", context, case + state]
                assert (row["n"], row["unit"]) == (config.repeats, "us/call")
    assert figure["torch:sdpa-float32", "speedup", 96, case + "cold"]["value"] == 1
    assert figure["control:same", "attention_error", 96, case + "warm"]["value"] == 0
    assert 0 < figure["int8+reference", "attention_error", 200, case + "warm"]["value"] < 0.02
    assert (
        0 < figure["int4(tail=0)+reference", "attention_error", 200, case + "cold"]["value"] < 0.3
    )
    assert ("int4(tail=0)+reference+reference", "attention", 96, case + "warm") not in figure
    assert figure["int8+triton", "attention", 96, case + "warm"]["note"].startswith("does not run")
    assert "attention, us/call" in table


def test_memory_end_to_end(config, tmp_path, console):
    rows = ("growing", "int8", "transformers:static")
    config = replace(config, suite="memory", strategies=rows, context=(64, 144), batch=(2,))
    rows, table = start(config, tmp_path, console)
    figure = {(r["strategy"], r["metric"], r["context"]): r["value"] for r in rows}
    for context in (64, 144):
        assert figure[EXACT, "bytes_per_token", context] == 2 * 2 * 2 * 16 * 4
        assert figure["int8", "estimate_error", context] == 0
        assert (EXACT, "bytes_estimated", context) not in figure
    assert figure["int8", "bytes_held", 144] < figure[EXACT, "bytes_held", 144]
    assert "batch 2, context 144" in table


def test_drift_end_to_end(config, tmp_path, console):
    config = replace(config, suite="drift", strategies=("int8", "window(length=64)"))
    rows, table = start(config, tmp_path, console)
    kl = {(r["strategy"], r["case"]): r["value"] for r in rows if r["metric"] == "kl"}
    assert kl[EXACT, None] == 0
    assert kl["window(length=64)", "20-32"] < 1e-9 < kl["window(length=64)", "128-192"]
    assert {r["context"] for r in rows} == {config.window}
    assert "KL by position" in table


def test_prefill_end_to_end(config, tmp_path, console):
    config = replace(config, suite="prefill", strategies=("growing",), context=(64, 144))
    rows, _ = start(config, tmp_path, console)
    for name in (EXACT, "growing", "control:same"):
        found = [r for r in rows if (r["strategy"], r["metric"]) == (name, "prefill")]
        assert [r["context"] for r in found] == [64, 144]
        assert all(r["n"] == config.repeats for r in found)


def test_a_suite_is_one_file(config, tmp_path, console, monkeypatch):
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "mine.py").write_text(
        "from evals.rows.schema import measured\n"
        "from evals.rows.tables import by_strategy\n"
        "from evals.rows.task import Task\n"
        "DEFAULTS, NEEDS = {}, set()\n"
        "def tasks(session):\n"
        "    s = session.contenders[0]\n"
        "    yield Task('mine', 'mine', s, lambda: iter([measured('kl', 1.0)]), 1.0)\n"
        "    yield Task('none', 'none', s, lambda: iter([]), 1.0)\n"
        "def tables(config, rows):\n"
        "    return [by_strategy('mine', rows)]\n"
    )
    monkeypatch.setattr(suites, "__path__", [*suites.__path__, str(tmp_path / "suites")])
    rows, table = start(replace(config, suite="mine"), tmp_path, console, ok=False)
    assert "1.000000" in table
    assert [row["error"] for row in rows] == [None, "RuntimeError: the task measured nothing"]
    assert [row["task"] for row in rows] == ["mine", "none"]


def test_prefix_end_to_end(config, tmp_path, console):
    contexts = (100, 140, 340)
    config = replace(config, suite="prefix", strategies=("growing", "int4"), context=contexts)
    rows, table = start(config, tmp_path, console)
    figure = {(r["strategy"], r["case"], r["metric"], r["context"]): r for r in rows}
    has_redis = binary() is not None and find_spec("redis") is not None
    for name, first in (("growing", 0), ("int4", 4)):  # tokens before its first block
        for case in ("memory", "file", *["redis"] * has_redis):
            reused = [figure[name, case, "reused", n]["value"] for n in contexts]
            tail = max(1, kvplug.parse(name).codec.tail)
            for n, chunk, found in zip(contexts, (64, 64, 256), reused, strict=True):
                chunks = (n - first - tail) // chunk
                assert found == (first + chunks * chunk if chunks > 0 else 0)
            assert figure[name, case, "speedup", 340]["n"] == config.repeats
        assert figure[name, "first", "first_token", 340]["value"] > 0
    stored = [figure[x, "file", "stored_per_token", 340]["value"] for x in ("int4", "growing")]
    assert 2 * 2 * 2 * 16 * 4 <= stored[1] < 1.3 * 2 * 2 * 2 * 16 * 4  # float32, and the header
    assert stored[0] < stored[1] / 3
    for case in "copied", "cut":
        assert figure[EXACT, case, "first_token", 340]["n"] == config.repeats
    assert "int4, file" in table
    assert "Fewest reused tokens that made a call faster than computing all: " in table


def test_replay_end_to_end(config, tmp_path, console):
    config = replace(config, suite="replay", strategies=("growing", "int4"), context=(600,))
    rows, table = start(config, tmp_path, console)
    figure = {(r["strategy"], r["case"], r["metric"]): r for r in rows}
    for name, first in (("growing", 0), ("int4", 4)):
        tail = max(1, kvplug.parse(name).codec.tail)
        chunks = [max(0, 60 * turn - first - tail) // 256 for turn in range(1, 10)]  # left behind
        found = sum(first + 256 * n for n in chunks if n)
        share = figure[name, "chat", "reused_share"]["value"]
        assert share == pytest.approx(found / sum(60 * turn for turn in range(1, 11)))
        share = figure[name, "document", "reused_share"]["value"]
        assert share == pytest.approx(4 * (first + 512) / (5 * 600))
        assert figure[name, "document", "first_token"]["n"] == 5
    assert figure[EXACT, "chat", "speedup"]["value"] == 1
    assert "10 turns" in table


def test_encode_end_to_end(config, tmp_path, console, add_rival):
    """Blocks are encoded, for queries where the codec does so, and what is not is no cost."""
    add_rival("failing:card", "def build(config, length):\n    raise RuntimeError('no card')\n")
    body = (
        "class Slow(DynamicCache):\n"
        "    def update(self, keys, *args):\n"
        "        import time\n"
        "        time.sleep(0.05)\n"
        "        return super().update(keys, *args)\n"
        "def build(config, length):\n    return Slow(config=config)\n"
    )
    add_rival("slow:cache", body)
    rows = ("growing", "int4", "slow:cache", "failing:card")
    config = replace(config, suite="encode", strategies=rows, context=(300,), repeats=3)
    rows, table = start(config, tmp_path, console, ok=False)
    figure = {(r["strategy"], r["metric"]): r for r in rows}
    assert figure[EXACT, "prefill"]["n"] == encode.PREFILLS
    for name in ("growing", "int4", "slow:cache", "control:same"):
        assert figure[name, "encode"]["n"] == 3
        share = figure[name, "encode"]["value"] / figure[EXACT, "prefill"]["value"] / 10
        assert figure[name, "encode_share"]["value"] == pytest.approx(share)
    assert 100 < figure["slow:cache", "encode"]["value"] < 200, "two layers"
    assert figure["failing:card", None]["error"] == "RuntimeError: no card"
    assert "| `slow:cache` | - | 1" in table
    assert {name for name, metric in figure if metric == "encode_token"} == {"int4"}
    assert figure["int4", "encode_token"]["n"] == encode.BLOCKS


def test_encode_counts_what_a_block_takes_once_over_its_tokens(session, monkeypatch):
    codec = kvplug.parse("int4").codec
    encoded = type(codec).encode

    def slow(*args):
        time.sleep(0.064)
        return encoded(*args)

    monkeypatch.setattr(type(codec), "encode", slow)
    (exact, int4) = resolve(["int4"])
    states = exact_states(session.model, exact, session.ids[:100])
    samples = encode.per_token(session, int4, states)
    assert len(samples) == encode.BLOCKS
    for ms in samples:
        assert ms == pytest.approx(64 * len(states) / codec.block, rel=0.5)


def test_encode_encodes_what_a_prefill_does(session):
    session.config = replace(session.config, strategies=("int4",))
    (exact, int4) = resolve(["int4"])
    states = exact_states(session.model, exact, session.ids[:300])
    built = []
    build = type(int4).build
    with mock.patch.object(type(int4), "build", lambda *a: built.append(build(*a)) or built[-1]):
        assert len(encode.taking_in(session, int4, states)()) == 1
    prompt = int4.build(session.model.config, 300)
    step(session.model, prompt, session.ids[None, :300])
    told = [cache.stats() for cache in (*built, prompt)]
    assert len(told) == 3
    assert {one["blocks_encoded"] for one in told} == {told[-1]["blocks_for_queries"]}
    assert {one["blocks_for_queries"] for one in told} == {told[-1]["blocks_for_queries"]}
    assert told[-1]["blocks_for_queries"] > 0
