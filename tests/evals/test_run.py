import json
import shutil
from dataclasses import replace

import pytest

from evals.__main__ import main
from evals.report.runs import read
from evals.rows.schema import METRICS, Row
from evals.rows.store import WriteFailed
from evals.run import run
from kvplug.codecs.rotated import Int2

pytestmark = pytest.mark.usefixtures("offline")

FAILING = "def build(config, max_cache_len):\n    raise RuntimeError('no such card [/red]')\n"
QUICK = {
    *("prefill", "decode", "peak_prefill", "peak_decode", "bytes_held"),
    *("perplexity", "perplexity_delta", "kl", "top1", "greedy"),
    *("decode_new", "throughput", "speedup", "floor", "floor_share"),
}
LYING = """
class Liar(DynamicCache):
    def nbytes(self):
        return 1


def build(config, max_cache_len):
    return Liar(config=config)
"""
LATE = """
class Late(DynamicCache):
    def crop(self, *_):
        pass

    def update(self, *args, **kwargs):
        if self.get_seq_length() >= 170:  # longer than any speed run: drift is what breaks
            raise IndexError('out of blocks')
        return super().update(*args, **kwargs)


def build(config, max_cache_len):
    return Late(config=config)
"""


def start(config, out, console):
    ok = run(config, out, console)
    folders = [path for path in out.iterdir() if path.is_dir()]
    assert len(folders) == 1
    return ok, folders[0], read(folders[0])


def test_a_run_writes_every_figure_with_its_provenance(config, tmp_path, console):
    config = replace(config, strategies=("growing", "int8", "transformers:static"))
    ok, folder, (written, env, rows) = start(config, tmp_path / "out", console)
    assert ok
    names = ["transformers:dynamic", "growing", "int8", "transformers:static"]
    controls = ["control:broken", "control:plain", "control:same"]
    assert list(dict.fromkeys(row["strategy"] for row in rows)) == names + controls
    for name in names:
        assert {row["metric"] for row in rows if row["strategy"] == name} == QUICK <= set(METRICS)
    assert all(set(row) == set(Row.__annotations__) for row in rows)
    assert all(row["value"] is not None or row["note"] for row in rows)
    assert written["strategies"] == names
    assert written["dataset"] == config.dataset
    assert env["dataset"].startswith("book.txt sha256:")
    assert env["model"] == "tiny sha256:0"
    assert env["placement"] == "cpu"
    assert {row["run"] for row in rows} == {folder.name}
    answer = json.loads((folder / "drift" / "int8.json").read_text())
    assert answer["kl"] >= 0
    assert not any(str(value).startswith("/") for value in answer.values())

    figure = {(row["strategy"], row["metric"]): row for row in rows}
    for name in ("transformers:dynamic", "growing", "transformers:static"):
        assert figure[name, "kl"]["value"] < 1e-9
        assert figure[name, "greedy"]["value"] == config.new_tokens
    assert figure["transformers:dynamic", "kl"]["value"] == 0
    assert figure["control:broken", "kl"]["value"] > 0.05
    exact = figure["transformers:dynamic", "perplexity"]["value"]
    assert figure["control:plain", "perplexity"]["value"] == pytest.approx(exact, rel=1e-4)
    assert ("control:same", "decode") in figure
    tokens = config.context[0] + config.warmup + config.decode_steps
    per_token = 2 * 2 * 2 * 16 * 4  # layers, K and V, heads, head_dim, float32
    assert figure["transformers:dynamic", "bytes_held"]["value"] == tokens * per_token
    assert figure["transformers:dynamic", "decode"]["n"] == config.repeats * config.decode_steps
    assert figure["int8", "decode"]["stats"]["kernels"]

    table = (folder / "table.md").read_text()
    assert "`int8`" in table
    assert "KL, nat ↓" in table
    assert "Batch 1, context 144" in table
    assert "A/A: the reference measured twice" in table
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_is_a_function_of_the_files(config, tmp_path, console):
    _, folder, _ = start(config, tmp_path / "out", console)
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for name in ("config.json", "env.json", "rows.jsonl"):
        (copy / name).write_bytes((folder / name).read_bytes())
    shutil.copytree(folder / "drift", copy / "drift")
    assert main(["report", str(copy)]) == 0
    for name in ("table.md", "picture.png", "report.html"):
        assert (copy / name).read_bytes() == (folder / name).read_bytes()


def test_a_strategy_that_fails_is_a_row_and_an_exit_code(
    config, tmp_path, monkeypatch, capsys, add_rival
):
    add_rival("failing:card", FAILING)
    add_rival("failing:late", LATE)
    flags = {
        "windows": 1,
        "window": 192,
        "chunk": 16,
        "skip": 20,
        "context": 144,
        "decode-steps": 4,
    }
    flags |= {"warmup": 1, "new-tokens": 6, "dataset": config.dataset, "out": tmp_path / "out"}
    argv = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    rows = "failing:card,failing:late,transformers:static"
    assert main(["run", *argv, "--strategies", rows]) == 1

    folder = next((tmp_path / "out").iterdir())
    _, _, rows = read(folder)
    errors = {row["strategy"]: row["error"] for row in rows if row["status"] == "failed"}
    assert errors == {
        "failing:card": "RuntimeError: no such card [/red]",
        "failing:late": "IndexError: out of blocks",
    }
    measured = {row["metric"] for row in rows if row["strategy"] == "failing:late"}
    assert "decode" in measured, "what was measured before the failure stays"
    assert "kl" not in measured
    assert {row["metric"] for row in rows if row["strategy"] == "transformers:static"} == QUICK
    table = (folder / "table.md").read_text()
    assert "`failing:card` failed: RuntimeError: no such card" in table
    assert [row["done"] for row in rows if row["task"] == "quick/failing-late"][-1] is True
    assert "no such card [/red]" in capsys.readouterr().out
    assert main(["report", str(folder)]) == 1


def test_a_cache_that_claims_other_bytes_than_it_holds_fails(config, tmp_path, console, add_rival):
    add_rival("liar:cache", LYING)
    config = replace(config, strategies=("liar:cache",))
    ok, _, (_, _, rows) = start(config, tmp_path / "out", console)
    assert not ok
    (error,) = {row["error"].partition(" finds ")[0] for row in rows if row["status"] == "failed"}
    assert "nbytes() claims 1 bytes, a walk over the cache's tensors" in error


@pytest.mark.parametrize("where", ["evals.rows.store.os.fsync", "evals.rows.store.evaluate.save"])
def test_a_failed_write_stops_the_run(where, config, tmp_path, console, monkeypatch, capsys):
    config = replace(config, suite="drift", strategies=("transformers:dynamic", "growing"))
    calls = []

    def full(*_, **__):
        calls.append(1)
        if len(calls) > 3 or "save" in where:  # config.json, env.json and an empty rows.jsonl
            raise OSError(28, "No space left")

    monkeypatch.setattr(where, full)
    with pytest.raises(WriteFailed, match=r"cannot write .*: .*No space left; the run stops here"):
        run(config, tmp_path / "out", console)
    (folder,) = (tmp_path / "out").iterdir()
    assert "growing" not in (folder / "rows.jsonl").read_text()


def test_a_control_that_shows_no_drift_fails_the_run(config, tmp_path, console, monkeypatch):
    monkeypatch.setattr("evals.setup.control.BrokenCodec.encode_side", Int2.encode_side)
    monkeypatch.setattr("evals.setup.control.LEAST_KL", 9.0)
    ok, _, (_, _, rows) = start(replace(config, suite="drift"), tmp_path / "out", console)
    assert not ok
    (row,) = (row for row in rows if row["status"] == "failed")
    assert row["strategy"] == "control:broken"
    assert row["error"].startswith("SelfCheckFailed: the broken codec shows a KL of only")


def test_a_figure_that_is_no_number_is_a_failure_not_json_that_nobody_reads(
    config, tmp_path, console, add_rival
):
    add_rival(
        "nan:cache",
        "class Nan(DynamicCache):\n"
        "    def update(self, *args, **kwargs):\n"
        "        k, v = super().update(*args, **kwargs)\n"
        "        return k, v * float('nan')\n\n\n"
        "def build(config, max_cache_len):\n"
        "    return Nan(config=config)\n",
    )
    config = replace(config, strategies=("nan:cache",))
    ok, folder, (_, _, rows) = start(config, tmp_path / "out", console)
    assert not ok
    (error,) = (row["error"] for row in rows if row["status"] == "failed")
    assert error.startswith("FloatingPointError: perplexity is not finite")
    assert "NaN" not in (folder / "rows.jsonl").read_text()


def test_a_text_too_short_is_refused_with_both_numbers(config, tmp_path, capsys):
    argv = ["run", "--dataset", config.dataset, "--out", str(tmp_path / "out")]
    assert main([*argv, "--context", "99999", "--strategies", "dynamic"]) == 2
    assert "this run needs 99,999" in capsys.readouterr().err


def test_a_dry_run_shows_the_plan_and_writes_nothing(config, tmp_path, console):
    config = replace(config, suite="decode", strategies=("int8",), batch=(1, 2))
    assert run(config, tmp_path / "out", console, dry=True)
    assert not (tmp_path / "out").exists()
    shown = console.file.getvalue()
    assert "decode/b2/t144" in shown
    assert "GB on top of the model" in shown
    assert "predicted floor" in shown


def test_quick_refuses_several_contexts(config, tmp_path, capsys):
    argv = ["run", "--dataset", config.dataset, "--out", str(tmp_path / "out")]
    assert main([*argv, "--context", "64,128", "--window", "192", "--skip", "8"]) == 2
    assert "suite 'quick' measures one context and one batch" in capsys.readouterr().err
