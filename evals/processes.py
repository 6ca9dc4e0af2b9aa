"""The processes of one run: one, or as many as `accelerate launch` starts."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

if TYPE_CHECKING:
    from evals.task import Task

PATIENCE = timedelta(days=7)  # how long one waits for the others


def state() -> PartialState:
    """Return this process's place among the others; the same object at every call."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def agree(keys: list[str]) -> set[str]:
    """Return what the main process gave."""
    told = [keys]
    broadcast_object_list(told)
    return set(told[0])


def split(tasks: list[Task]) -> tuple[list[Task], list[Task]]:
    """Return this process's part of the tasks that may run at once, and those that may not.

    Times are measured by the main process, when the others are done: processes that share a
    machine's cores or memory would slow each other down.
    """
    here = state()
    if here.num_processes == 1:
        return tasks, []
    shared = [task for task in tasks if task.shared]
    alone = [task for task in tasks if not task.shared] if here.is_main_process else []
    return shared[here.process_index :: here.num_processes], alone


def caption(tasks: list[Task]) -> str:
    """Return how tasks are spread, and the time that takes, in words."""
    count = state().num_processes
    shared, alone = (
        sum(task.seconds for task in tasks if task.shared is kind) for kind in (True, False)
    )
    minutes = f"about {(shared / count + alone) / 60:.1f} minutes"
    if count == 1:
        return minutes
    number = sum(task.shared for task in tasks)
    return (
        f"{minutes} ({number} tasks split over {count} processes; the {len(tasks) - number} that "
        "measure time run on one of them after that, so that none disturbs them)"
    )
