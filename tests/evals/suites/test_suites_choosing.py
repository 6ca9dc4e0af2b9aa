"""What choosing costs is what the clock in the layers says, and nothing else."""

import time
from dataclasses import replace

import pytest
import tiny_run

from evals.measure.choosing import METHODS, clocked
from evals.run import run
from evals.setup.config import ConfigError
from kvplug.layers.scored import ScoredLayer
from kvplug.retention.keydiff import KeyDiff

pytestmark = pytest.mark.usefixtures("offline")
SLEEP = 0.03


@pytest.mark.parametrize("spec", ["keydiff(budget=64, every=4)", "snapkv(budget=64, every=4)"])
def test_end_to_end(spec, config, tmp_path, console):
    config = replace(config, suite="choosing", strategies=(spec,), context=(120,), repeats=2)
    folder, rows = tiny_run.measured(config, tmp_path / "out", console)
    figure = {row["metric"]: row for row in rows}
    assert set(figure) == {"choosing_prefill", "choosing_decode"}
    assert all(row["n"] == 2 and 0 < row["p20"] <= row["p80"] < 100 for row in rows)
    assert {row["strategy"] for row in rows} == {spec}
    assert "choosing, % of prefill" in (folder / "table.md").read_text()


def test_a_method_that_sleeps_takes_most_of_the_time(config, tmp_path, console, monkeypatch):
    """Once in the prefill and once in each cycle, in each of two layers."""
    score = KeyDiff.score

    def slow(self, tokens):
        time.sleep(SLEEP)
        return score(self, tokens)

    monkeypatch.setattr(KeyDiff, "score", slow)
    spec = "keydiff(budget=64, every=2)"
    config = replace(config, suite="choosing", strategies=(spec,), context=(120,), repeats=1)
    _, rows = tiny_run.measured(config, tmp_path / "out", console)
    for row in rows:
        assert row["value"] > 50


def test_the_clock_is_taken_out_again(session):
    before = {name: vars(ScoredLayer)[name] for name in METHODS}

    def fail():
        with clocked(session.device):
            assert vars(ScoredLayer)[METHODS[0]] is not before[METHODS[0]]
            raise RuntimeError("out")

    with pytest.raises(RuntimeError, match="out"):
        fail()
    assert {name: vars(ScoredLayer)[name] for name in METHODS} == before


@pytest.mark.parametrize(
    "spec", ["int4", "window(length=64)", "snapkv(budget=64)+int4", "transformers:static"]
)
def test_what_chooses_nothing_or_encodes_is_refused(spec, config, tmp_path, console):
    config = replace(config, suite="choosing", strategies=(spec,))
    with pytest.raises(ConfigError, match="takes methods that choose by content"):
        run(config, tmp_path / "out", console)
