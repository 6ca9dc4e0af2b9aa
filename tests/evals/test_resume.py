"""A run that is killed and started again has the rows of one that was not."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import datasets
import pytest
import tiny_run
from rich.console import Console
from tiny_run import STRATEGIES, figures

from evals.__main__ import main
from evals.measure import machine
from evals.report.runs import read
from evals.rows.store import load_rows
from evals.run import run
from evals.setup import model as packaged_model
from evals.setup.config import ConfigError

pytestmark = pytest.mark.usefixtures("offline")

FLAKY = """
import pathlib


def build(config, max_cache_len):
    if pathlib.Path({mark!r}).exists():
        return DynamicCache(config=config)
    raise RuntimeError('not yet')
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny):
    """The config of a run that nothing has broken, and where it is."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "book.txt").write_text(tiny_run.text(), encoding="utf-8")
    given = {"suite": "drift", "strategies": STRATEGIES, "windows": 1}
    config = tiny_run.config(str(folder / "book.txt"), **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packaged_model, "load", lambda name, dtype: tiny_run.loaded(tiny))
        patch.setattr(machine, "READ", tiny_run.READ)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        assert run(config, folder / "unbroken", Console(quiet=True))
    return config, folder / "unbroken"


@pytest.fixture
def drift(whole):
    return whole[0]


@pytest.fixture
def unbroken(whole, tmp_path):
    """A copy of that run for each test; its figures."""
    (folder,) = shutil.copytree(whole[1], tmp_path / "unbroken").iterdir()
    return figures(folder)


def test_interrupted_at_any_row_and_resumed_gives_the_same_rows(
    drift, tmp_path, console, monkeypatch, unbroken
):
    from evals.rows.store import Results

    append = Results.append
    for stop in (0, 7, 30, len(unbroken) - 1):
        out = tmp_path / f"stopped-{stop}"

        def interrupted(self, row, left=[stop]):  # noqa: B006
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            append(self, row)

        monkeypatch.setattr(Results, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(drift, out, console)
        monkeypatch.setattr(Results, "append", append)
        (folder,) = out.iterdir()
        assert len(load_rows(folder / "rows.jsonl")) == stop
        assert (folder / "table.md").exists(), "what there is can be read"
        assert "the same command goes on where this stopped" in console.file.getvalue()
        assert run(drift, out, console)
        assert figures(folder) == unbroken


def test_ctrl_c_is_exit_code_130(drift, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("evals.measure.drift.measure", interrupted)
    argv = ["run", "--suite", "drift", "--dataset", drift.dataset, "--out", str(tmp_path / "out")]
    assert main([*argv, "--window", "192", "--skip", "8", "--context", "64"]) == 130


@pytest.mark.parametrize("left", [1, 40])
def test_a_last_line_that_was_cut_off_is_dropped(left, drift, tmp_path, console, unbroken):
    (folder,) = (tmp_path / "unbroken").iterdir()
    path = folder / "rows.jsonl"
    text = path.read_text()
    path.write_text(text[:-left])
    assert len(read(folder)[2]) == len(unbroken) - 1
    assert run(drift, tmp_path / "unbroken", console)
    assert figures(folder) == unbroken


def test_a_line_damaged_elsewhere_is_not_passed_over(drift, tmp_path, console, unbroken):
    (folder,) = (tmp_path / "unbroken").iterdir()
    path = folder / "rows.jsonl"
    path.write_text(path.read_text().replace('"kl"', '"kl', 1))
    with pytest.raises(ConfigError, match="line 3 is damaged"):
        run(drift, tmp_path / "unbroken", console)


def test_a_finished_run_is_only_rendered_and_again_discards_it(
    drift, tmp_path, console, monkeypatch, unbroken
):
    out = tmp_path / "unbroken"
    with monkeypatch.context() as patch:
        patch.setattr("evals.run.measure", lambda *_: pytest.fail("measured again"))
        assert run(drift, out, console)
    assert "complete, nothing to measure" in console.file.getvalue()
    (folder,) = out.iterdir()
    rows = folder / "rows.jsonl"
    rows.write_text(rows.read_text().replace('"time": "20', '"time": "19'))  # a century ago
    before = load_rows(rows)
    assert run(drift, out, console, again=True)
    after = load_rows(rows)
    assert len(after) == len(before)
    assert all(row["time"] > "20" > old["time"] for row, old in zip(after, before, strict=True))


def test_a_changed_config_does_not_see_the_rows(drift, tmp_path, console, unbroken):
    out = tmp_path / "unbroken"
    assert run(replace(drift, skip=21), out, console)
    assert len(list(out.iterdir())) == 2


def test_rows_of_another_environment_are_refused(drift, tmp_path, console, unbroken):
    (folder,) = (tmp_path / "unbroken").iterdir()
    env = json.loads((folder / "env.json").read_text())
    (folder / "env.json").write_text(json.dumps(env | {"hardware": "abacus"}))
    with pytest.raises(ConfigError, match="measured with hardware 'abacus', now it is"):
        run(drift, tmp_path / "unbroken", console)
    assert run(drift, tmp_path / "unbroken", console, again=True)


def test_what_failed_is_tried_again(drift, tmp_path, console, add_rival, monkeypatch):
    mark = tmp_path / "mark"
    add_rival("flaky:cache", FLAKY.format(mark=str(mark)))
    drift = replace(drift, strategies=("flaky:cache", "growing"))
    assert not run(drift, tmp_path / "out", console)
    mark.touch()
    assert run(drift, tmp_path / "out", console)
    (folder,) = (tmp_path / "out").iterdir()
    rows = read(folder)[2]
    assert not [row for row in rows if row["status"] == "failed"]
    names = list(dict.fromkeys(row["strategy"] for row in rows))
    assert names[:3] == ["transformers:dynamic", "flaky:cache", "growing"], "in order all the same"


def test_killed_at_twenty_random_moments_and_resumed(
    drift, tmp_path, console, unbroken, monkeypatch
):
    """Real SIGKILLs, wherever the run happens to be while it measures."""
    monkeypatch.setattr("evals.run.render", lambda *_: True)
    out = tmp_path / "killed"
    script = [sys.executable, tiny_run.__file__, drift.dataset, str(out), "20", "0"]
    done = subprocess.run(script, check=True, capture_output=True, text=True, timeout=170)
    left = list(map(int, done.stdout.split()))
    assert len(left) == 20
    assert len(set(left)) > 2, "not always at the same place"
    for folder in sorted(out.glob("*/*")):
        assert run(drift, folder.parent, console)
        assert [path.name for path in folder.parent.iterdir()] == [folder.name], "the same config"
        assert figures(folder) == unbroken
