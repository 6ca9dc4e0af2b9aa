"""Several processes measure one run."""

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_run
from test_evals_resume import STRATEGIES, figures

from evals.rows.store import Results, load_rows
from evals.rows.task import Task
from evals.run import run
from evals.setup import processes

pytestmark = pytest.mark.usefixtures("offline")

LAUNCH = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
    *("--main_process_port", "0"),
]


def test_two_processes_give_the_figures_of_one(config, tmp_path, console):
    out = tmp_path / "two"
    script = [*LAUNCH, tiny_run.__file__, config.dataset, str(out)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=170, env=os.environ)
    assert done.returncode == 0, done.stderr
    (two,) = out.iterdir()
    assert run(replace(config, suite="drift", strategies=STRATEGIES), tmp_path / "one", console)
    (one,) = (tmp_path / "one").iterdir()
    assert one.name == two.name, "the same config"
    by_task = [sorted(figures(folder), key=lambda row: row["task"]) for folder in (one, two)]
    assert by_task[0] == by_task[1]
    assert not list(two.glob("rows.?.jsonl")), "merged"
    order = list(dict.fromkeys(row["task"] for row in load_rows(two / "rows.jsonl")))
    assert order[:2] == ["drift/transformers-dynamic", "drift/transformers-static"], "every other"


def tasks():
    return [Task(str(i), "", None, None, seconds=60.0, shared=i % 3 > 0) for i in range(6)]


@pytest.mark.parametrize(
    ("process", "at_once", "after"), [(0, ["1", "4"], ["0", "3"]), (1, ["2", "5"], [])]
)
def test_only_tasks_without_times_run_at_once(monkeypatch, process, at_once, after):
    here = SimpleNamespace(num_processes=2, process_index=process, is_main_process=process == 0)
    monkeypatch.setattr(processes, "state", lambda: here)
    keys = [[task.key for task in part] for part in processes.split(tasks())]
    assert keys == [at_once, after]
    assert processes.caption(tasks()).startswith(
        "about 4.0 minutes (4 tasks split over 2 processes"
    )


def test_one_process_does_all_in_order():
    assert processes.split(tasks())[0] == tasks()
    assert processes.caption(tasks()) == "about 6.0 minutes"


def test_rows_that_another_process_left_are_taken_in_once(tmp_path):
    row = {"task": "a", "status": "ok", "done": True}
    results = Results(tmp_path, {}, {})
    results.append(row)
    left = tmp_path / "rows.1.jsonl"
    text = (tmp_path / "rows.jsonl").read_text()
    left.write_text(text + text.replace('"a"', '"b"') + '{"task": "c", "sta')
    assert [r["task"] for r in load_rows(results.path)] == ["a", "b"]
    assert Results(tmp_path, {}, {}).finished == {"a", "b"}
    assert not left.exists()
    assert [r["task"] for r in load_rows(results.path)] == ["a", "b"]
