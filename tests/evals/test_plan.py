"""Which process measures what, and how long that takes."""

from types import SimpleNamespace

import pytest

from evals import plan
from evals.rows.task import Task
from evals.setup import processes


def tasks():
    return [Task(str(i), "", None, None, seconds=60.0, shared=i % 3 > 0) for i in range(6)]


@pytest.mark.parametrize(
    ("process", "at_once", "after"), [(0, ["1", "4"], ["0", "3"]), (1, ["2", "5"], [])]
)
def test_only_tasks_without_times_run_at_once(monkeypatch, process, at_once, after):
    here = SimpleNamespace(num_processes=2, process_index=process, is_main_process=process == 0)
    monkeypatch.setattr(processes, "state", lambda: here)
    keys = [[task.key for task in part] for part in plan.split(tasks())]
    assert keys == [at_once, after]
    assert plan.duration(tasks()).startswith("about 4.0 minutes (4 tasks split over 2 processes")


def test_one_process_does_all_in_order():
    assert plan.split(tasks())[0] == tasks()
    assert plan.duration(tasks()) == "about 6.0 minutes"
