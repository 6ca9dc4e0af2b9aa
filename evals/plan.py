"""What is left to measure, by which process, and how long that takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evals import suites
from evals.report import render
from evals.rows.tables import Table
from evals.setup import processes

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from rich.console import Console

    from evals.measure.session import Session
    from evals.rows.task import Task


def unfinished(tasks: list[Task], finished: Iterable[str]) -> list[Task]:
    """Return the tasks that the main process has not found finished."""
    done = processes.agree(sorted(finished))
    return [task for task in tasks if task.key not in done]


def split(tasks: list[Task]) -> tuple[list[Task], list[Task]]:
    """Return this process's part of the tasks that may run at once, and those that may not.

    Times are measured by the main process, when the others are done: processes that share a
    machine's cores or memory would slow each other down.
    """
    here = processes.state()
    if here.num_processes == 1:
        return tasks, []
    shared = [task for task in tasks if task.shared]
    alone = [task for task in tasks if not task.shared] if here.is_main_process else []
    return shared[here.process_index :: here.num_processes], alone


def duration(tasks: list[Task]) -> str:
    """Return the time that tasks take, and how they are spread, in words."""
    count = processes.state().num_processes
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


def show(session: Session, tasks: list[Task], folder: Path, console: Console) -> None:
    """Show what would be measured, and what that takes."""
    body = [
        [task.key, task.title, f"{task.seconds:.0f}", f"{task.nbytes / 1e6:.0f}"] for task in tasks
    ]
    peak = max(task.nbytes for task in tasks)
    said = (
        f"{len(tasks)} tasks, {duration(tasks)} and {peak / 1e9:.2f} GB on top of the "
        f"model, predicted from a step of each strategy. Would write {folder}."
    )
    render.show_table(Table("plan", ["task", "measures", "s", "MB"], body, [said]), console)
    show_forecast(session, console)


def show_forecast(session: Session, console: Console) -> None:
    """Show what the suite says before measuring."""
    for table in suites.forecast(session.config.suite, session):
        render.show_table(table, console)
