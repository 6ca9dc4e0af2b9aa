"""The suites that compare whole answers: generation, use_cache, and full, which has them all."""

import json
from dataclasses import replace

import pytest
import tiny_run

from evals.run import run
from evals.setup.config import Config, ConfigError
from evals.suites import full, use_cache

pytestmark = pytest.mark.usefixtures("offline")


def test_generation_end_to_end(config, tmp_path, console):
    rows = ("growing", "int2", "transformers:static")
    config = replace(config, suite="generation", strategies=rows, batch=(3,), new_tokens=12)
    folder, rows = tiny_run.measured(config, tmp_path / "out", console)
    figure = {(r["strategy"], r["metric"]): r for r in rows}
    perfect = {"greedy": 12, "edit_distance": 0, "exact_match": 1}
    for name in ("transformers:dynamic", "growing", "transformers:static"):
        for metric, value in perfect.items():
            assert figure[name, metric]["value"] == value
    broken = {metric: figure["int2", metric] for metric in (*perfect, "rouge1", "rougeL")}
    assert broken["greedy"]["value"] < 12
    assert 0 < broken["edit_distance"]["value"] <= 1
    assert broken["exact_match"]["value"] < 1
    assert all(row["n"] == 3 for row in broken.values())
    saved = json.loads((folder / "generation" / "b3-t144-int2.json").read_text())
    assert len(saved["continuations"]) == 3
    assert "edit distance" in (folder / "table.md").read_text()


def test_use_cache_end_to_end(config, tmp_path, console):
    config = replace(config, suite="use_cache", strategies=("growing",), context=(24, 12))
    folder, rows = tiny_run.measured(config, tmp_path / "out", console)
    figure = {(r["strategy"], r["metric"], r["context"]): r for r in rows}
    for name in ("transformers:dynamic", "growing", "control:recompute", "control:same"):
        for length in (12, 24):
            assert figure[name, "generate", length]["n"] == config.repeats
            assert figure[name, "cache_gain", length]["value"] > 0
        assert figure[name, "exponent", 24]["n"] == config.repeats
    assert figure["control:recompute", "cache_gain", 12]["value"] == 1
    assert "exponent of time over length" in (folder / "table.md").read_text()


def test_a_cache_that_fails_leaves_the_others_their_exponents(config, tmp_path, console, add_rival):
    add_rival("refusing:always", "def build(config, length):\n    raise RuntimeError('no card')\n")
    config = replace(config, suite="use_cache", strategies=("refusing:always",), context=(4, 8))
    _, rows = tiny_run.measured(config, tmp_path / "out", console, ok=False)
    assert [r["strategy"] for r in rows if r["status"] == "failed"] == ["refusing:always"]
    assert sum(r["metric"] == "exponent" for r in rows) == 3


def test_the_exponent_of_a_power_is_its_exponent():
    lengths = [8, 16, 64]
    assert use_cache.exponent(lengths, tuple(3 * n**1.5 for n in lengths)) == pytest.approx(1.5)


SIZES = {
    "quick": {"context": (40,), "decode_steps": 2, "warmup": 1, "new_tokens": 4},
    "drift": {"context": (40,), "windows": 1},
    "decode": {"context": (40, 60), "batch": (1, 2), "decode_steps": 2, "repeats": 1},
    "memory": {"context": (40,), "decode_steps": 2},
    "retrieval": {"context": (144,), "trials": 1},
    "generation": {"context": (40,), "batch": (2,), "new_tokens": 4},
    "use_cache": {"strategies": ("transformers:dynamic",), "context": (4, 8), "repeats": 1},
}


@pytest.fixture
def whole(config, words, monkeypatch):
    """Return a run of all parts, each small."""
    monkeypatch.setattr(full, "PARTS", SIZES)
    letters = "abcdefghijklmnopqrstuvwxyz"
    found = [letters[i : i + 5] for i in range(22)] + [letters[i : i + 6] for i in range(21)]
    with open(config.dataset, "a", encoding="utf-8") as book:
        book.write("\n".join(" ".join(found) for _ in range(20)))
    sizes = {"window": 192, "chunk": 16, "skip": 20, "threads": 1}
    return Config(suite="full", dataset=config.dataset, strategies=("int8",), **sizes)


def test_full_end_to_end(whole, tmp_path, console):
    folder, rows = tiny_run.measured(whole, tmp_path / "out", console)
    assert list(dict.fromkeys(r["suite"] for r in rows if r["strategy"] == "int8")) == [
        name for name in SIZES if name != "use_cache"
    ]
    contexts = {name: {r["context"] for r in rows if r["suite"] == name} for name in SIZES}
    assert contexts == {
        "quick": {40},
        "drift": {192},
        "decode": {0, 40, 60},
        "memory": {40},
        "retrieval": {144},
        "generation": {40},
        "use_cache": {4, 8},
    }
    written = json.loads((folder / "config.json").read_text())
    assert written["parts"]["decode"]["batch"] == [1, 2]
    table = (folder / "table.md").read_text()
    for title in (
        "quick",
        "drift: KL by position",
        "decode: decode, ms/token",
        "use_cache: seconds",
    ):
        assert f"**{title}" in table
    assert run(whole, tmp_path / "out", console)
    assert "complete, nothing to measure" in console.file.getvalue()


def test_full_asks_what_loses_nothing_no_questions_unless_it_is_named():
    named = Config(suite="full", strategies=("growing",))
    assert full.parts(named)["retrieval"].strategies == ("growing",)
    parts = full.parts(Config(suite="full", strategies=full.DEFAULTS["strategies"]))
    assert parts["drift"].strategies == full.DEFAULTS["strategies"]
    lossless = {"growing", "kvplug:static", "host", "transformers:static"}
    assert set(parts["drift"].strategies) - set(parts["retrieval"].strategies) == lossless


def test_full_refuses_sizes_that_are_its_own_to_say(whole, tmp_path, console):
    with pytest.raises(ConfigError, match=r"context=\(64,\): suite 'full' has sizes of its own"):
        run(replace(whole, context=(64,)), tmp_path / "out", console)
