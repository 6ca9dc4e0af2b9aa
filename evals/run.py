"""The run: plan, measure what is not measured yet, write each row as it comes, and report."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from evals import plan, suites
from evals.measure.session import Session
from evals.report.render import render
from evals.rows import store
from evals.rows.schema import failed
from evals.setup import environment, processes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from evals.rows.schema import Row
    from evals.rows.task import Task
    from evals.setup.config import Config


def run(
    config: Config, out: Path, console: Console, *, again: bool = False, dry: bool = False
) -> bool:
    """Measure, write `out/<config hash>/` and show the tables; say whether no row failed.

    Tasks that an earlier run of the same config finished are not measured again; `again` discards
    them. `dry` only shows the plan. Of several processes the main one speaks, and keeps the files.
    """
    here = processes.state()
    suite = suites.get(config.suite)
    if not here.is_main_process:
        console = Console(quiet=True)
    with here.main_process_first():  # fetching a model and timing the machine disturb each other
        session = Session.prepare(config, suite.NEEDS, suites.tokens_needed(config), console)
        tasks = list(suite.tasks(session))
    config = session.config
    folder = out / config.key
    env = environment.describe(session.fingerprints, session.devices, config.seed)
    source = provenance(config, env)
    if dry:
        plan.show(session, tasks, folder, console)
        return True
    if not here.is_main_process:
        mine, _ = plan.split(plan.unfinished(tasks, []))
        measure(session, mine, store.Shard(folder, here.process_index), source, console)
        here.wait_for_everyone()
        return True

    if again:
        store.discard(folder)
    results = store.Results(folder, described(config), env)
    todo = plan.unfinished(tasks, results.finished)
    if not todo:
        console.print(f"complete, nothing to measure; --again measures anew: {folder}")
        here.wait_for_everyone()
        return render(folder, console)
    if len(todo) < len(tasks):
        console.print(f"{len(tasks) - len(todo)} of {len(tasks)} tasks are finished: {folder}")
    plan.show_forecast(session, console)
    mine, alone = plan.split(todo)
    try:
        measure(session, mine, results, source, console)
        here.wait_for_everyone()
        results.merge()
        if alone:
            measure(session, alone, results, source, console)
    except KeyboardInterrupt:
        render(folder, console)
        console.print(f"interrupted: the same command goes on where this stopped ({folder})")
        raise
    return render(folder, console)


def described(config: Config) -> dict[str, Any]:
    """Return what goes into config.json: of a suite made of others, each one's config too."""
    told = asdict(config)
    if list(parts := suites.parts(config)) != [config.suite]:
        told["parts"] = {name: asdict(part) for name, part in parts.items()}
    return told


def measure(
    session: Session,
    tasks: list[Task],
    results: store.Shard,
    source: dict[str, Any],
    console: Console,
) -> None:
    """Measure tasks one after another; each row is on disk before the next is measured."""
    session.save = results.save
    with progress(console) as bar:
        whole = bar.add_task(f"0 of {len(tasks)}", total=sum(task.seconds for task in tasks))
        for number, task in enumerate(tasks, 1):
            bar.update(whole, description=f"{number} of {len(tasks)} tasks")
            part, before = bar.add_task(task.title, total=task.seconds), bar.tasks[0].completed
            session.tick = ticker(bar, [whole, part], task.seconds / task.steps)
            for row, last in ended(guarded(task)):
                results.append(line(row, task, last, source))
            bar.update(whole, completed=before + task.seconds)
            bar.remove_task(part)


def ticker(bar: Progress, bars: list[Any], seconds: float) -> Callable[[], None]:
    """Return what moves some bars by one step."""

    def tick() -> None:
        for one in bars:
            bar.advance(one, seconds)

    return tick


def guarded(task: Task) -> Iterator[dict[str, Any]]:
    """Pass a task's rows on; if measuring raises, or gives nothing, that is its last row.

    Only what happens inside the measurement is caught: a result that cannot be written ends the
    run.
    """
    rows, empty = task.rows(), True
    while True:
        try:
            row = next(rows)
        except StopIteration:
            if empty:
                yield failed(RuntimeError("the task measured nothing"))
            return
        except store.WriteFailed:
            raise
        except Exception as error:  # the table shows it, and the exit code
            yield failed(error)
            return
        empty = False
        yield row


def ended(rows: Iterator[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield each row, and whether it is the last."""
    previous = next(rows)
    for row in rows:
        yield previous, False
        previous = row
    yield previous, True


def line(row: dict[str, Any], task: Task, last: bool, source: dict[str, Any]) -> Row:
    """Return a measured row with all that says where it is from."""
    whose = {"strategy": task.contender.name, "spec": task.contender.spec}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"task": task.key, "done": last} | whose | source | task.place | row | {"time": now}


def provenance(config: Config, env: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a row that is the same in all of a run, unless the row says otherwise."""
    versions = {name: env["versions"][name] for name in ("kvplug", "torch", "transformers")}
    here = {name: env[name] for name in ("git", "model", "dataset", "hardware", "threads")}
    return {
        "suite": config.suite,
        "run": config.key,
        **versions,
        **here,
        "dtype": config.dtype,
        "batch": config.batch[0],
        "context": config.context[0],
        "case": None,
    }


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    """Show bars for the run and the task at work, with the time gone and left."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield bar
