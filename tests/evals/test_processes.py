"""Several processes measure one run."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny_run
from tiny_run import STRATEGIES, figures

from evals.rows.store import load_rows
from evals.run import run

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
