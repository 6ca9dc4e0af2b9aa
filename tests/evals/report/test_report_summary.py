"""What is told of result folders before any table."""

import json

import made_runs as made
import pytest

from evals.report.caveats import caveats
from evals.report.html.page import page
from evals.report.runs import load, together
from evals.report.summary import summaries
from evals.rows.schema import measured


def test_the_summary_says_what_the_rows_say(folders):
    (said,) = summaries(load(folders))
    lines = {line.strategy: [claim.text for claim in line.claims] for line in said.lines}
    assert lines["int4"] == [
        "3.4x less memory",
        "2.3x faster at 6,000 tokens",
        "KL 0.005",
        "finds 75%",
    ]
    assert lines["growing"] == [
        "1.10x more memory",
        "1.01x faster ≈ at 6,000 tokens",
        "KL below 0.000001",
    ]
    assert said.alike == ["host"]
    assert [line.errors[0]["error"] for line in said.lines if line.errors] == [
        f"RuntimeError: {made.ERROR}"
    ]
    assert "A/A: the reference measured twice" in said.noise[0]


def test_a_summary_speaks_of_the_place_where_most_were_measured(tmp_path):
    rows = made.rows("memory")
    kept = [r for r in rows if (r["strategy"], r["context"]) != ("int4", made.FAR)]
    (said,) = summaries(load([made.folder(tmp_path, "memory", kept)]))
    assert [line.claims[0].figures for line in said.lines if line.strategy == "int4"] == [
        "0.9 MB against 2.9 at 512 tokens"
    ]


def test_runs_of_other_machines_are_not_read_side_by_side(folders):
    assert [len(group) for group in together(load(folders))] == [4]
    env = json.loads((folders[0] / "env.json").read_text()) | {"threads": 2}
    (folders[0] / "env.json").write_text(json.dumps(env))
    runs = load(folders)
    assert [len(group) for group in together(runs)] == [1, 3]
    assert "The runs differ in threads: 2, 1." in [caveat.text for caveat in caveats(runs)]


@pytest.mark.parametrize(
    ("broken", "exact", "grave"),
    [(4.0, 0.0, []), (0.01, 0.0, ["the broken codec"]), (4.0, 1e-3, ["the exact cache"])],
)
def test_a_control_that_shows_no_drift_is_told_at_the_top(tmp_path, broken, exact, grave):
    rows = made.named("control:broken", measured("kl", broken))
    rows += made.named(made.EXACT, measured("kl", exact))
    rows = [{"batch": 1, "context": 512, "case": None} | row for row in rows]
    runs = load([made.folder(tmp_path, "drift", rows)])
    found = [caveat for caveat in caveats(runs) if caveat.grave]
    assert len(found) == len(grave)
    assert all(word in caveat.text for word, caveat in zip(grave, found, strict=True))
    assert ("Do not trust these figures." in page(runs)) is bool(grave)


def test_what_was_not_checked_is_said(folders, tmp_path):
    unchecked = [
        made.folder(tmp_path, suite, [r for r in rows if not r["strategy"].startswith("control:")])
        for suite, rows in ((name, made.rows(name)) for name in ("drift", "decode"))
    ]
    told = [caveat.text for caveat in caveats(load(unchecked))]
    assert any("no broken codec was measured" in text for text in told)
    assert any("the noise is unknown" in text for text in told)
    told = [caveat.text for caveat in caveats(load(folders))]
    assert [text.rpartition("failed: ")[2] for text in told] == [f"RuntimeError: {made.ERROR}"]


def test_drift_of_random_weights_is_told_to_mean_nothing(folders):
    said = "the model's weights are random"
    assert not any(said in caveat.text for caveat in caveats(load(folders)))
    for folder in folders:
        env = json.loads((folder / "env.json").read_text())
        env["model"] = "shape:llama-1b, random weights of seed 0"
        (folder / "env.json").write_text(json.dumps(env))
    told = [caveat.text for caveat in caveats(load(folders)) if said in caveat.text]
    assert [text.split(" · ")[0] for text in told] == ["drift", "retrieval"], "not decode, memory"
