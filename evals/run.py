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

from evals import env, processes, report, store, suites
from evals.bench import Bench
from evals.schema import failed
from evals.tables import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from evals.config import Config
    from evals.schema import Row
    from evals.task import Task


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
        bench = Bench.prepare(config, suite.NEEDS, console)
        tasks = list(suite.tasks(bench))
    config = bench.config
    folder = out / config.key
    place = env.describe(bench.fingerprints, bench.placement, config.seed)
    source = provenance(config, place)
    if dry:
        plan(bench, tasks, folder, console)
        return True
    if not here.is_main_process:
        mine, _ = processes.split(unfinished(tasks, []))
        measure(bench, mine, store.Shard(folder, here.process_index), source, console)
        here.wait_for_everyone()
        return True

    if again:
        store.discard(folder)
    results = store.Results(folder, described(config), place)
    todo = unfinished(tasks, results.finished)
    if not todo:
        console.print(f"complete, nothing to measure; --again measures anew: {folder}")
        here.wait_for_everyone()
        return report.render(folder, console)
    if len(todo) < len(tasks):
        console.print(f"{len(tasks) - len(todo)} of {len(tasks)} tasks are finished: {folder}")
    for table in suite.forecast(bench) if hasattr(suite, "forecast") else []:
        report.show(table, console)
    mine, alone = processes.split(todo)
    try:
        measure(bench, mine, results, source, console)
        here.wait_for_everyone()
        results.merge()
        if alone:
            measure(bench, alone, results, source, console)
    except KeyboardInterrupt:
        report.render(folder, console)
        console.print(f"interrupted: the same command goes on where this stopped ({folder})")
        raise
    return report.render(folder, console)


def unfinished(tasks: list[Task], finished: Iterable[str]) -> list[Task]:
    """Return the tasks that the main process has not found finished."""
    done = processes.agree(sorted(finished))
    return [task for task in tasks if task.key not in done]


def described(config: Config) -> dict[str, Any]:
    """Return what goes into config.json: of a suite made of others, each one's config too."""
    told = asdict(config)
    if list(parts := suites.parts(config)) != [config.suite]:
        told["parts"] = {name: asdict(part) for name, part in parts.items()}
    return told


def measure(
    bench: Bench,
    tasks: list[Task],
    results: store.Shard,
    source: dict[str, Any],
    console: Console,
) -> None:
    """Measure tasks one after another; each row is on disk before the next is measured."""
    bench.save = results.save
    with progress(console) as bar:
        whole = bar.add_task(f"0 of {len(tasks)}", total=sum(task.seconds for task in tasks))
        for number, task in enumerate(tasks, 1):
            bar.update(whole, description=f"{number} of {len(tasks)} tasks")
            part, before = bar.add_task(task.title, total=task.seconds), bar.tasks[0].completed
            bench.tick = ticker(bar, [whole, part], task.seconds / task.steps)
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
    whose = {"strategy": task.strategy.name, "spec": task.strategy.spec}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"task": task.key, "done": last} | whose | source | task.place | row | {"time": now}


def provenance(config: Config, place: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a row that is the same in all of a run, unless the row says otherwise."""
    versions = {name: place["versions"][name] for name in ("kvplug", "torch", "transformers")}
    here = {name: place[name] for name in ("git", "model", "dataset", "hardware", "threads")}
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


def plan(bench: Bench, tasks: list[Task], folder: Path, console: Console) -> None:
    """Show what would be measured, and what that takes."""
    body = [
        [task.key, task.title, f"{task.seconds:.0f}", f"{task.nbytes / 1e6:.0f}"] for task in tasks
    ]
    peak = max(task.nbytes for task in tasks)
    said = (
        f"{len(tasks)} tasks, {processes.caption(tasks)} and {peak / 1e9:.2f} GB on top of the "
        f"model, predicted from a step of each strategy. Would write {folder}."
    )
    report.show(Table("plan", ["task", "measures", "s", "MB"], body, [said]), console)
    suite = suites.get(bench.config.suite)
    for table in suite.forecast(bench) if hasattr(suite, "forecast") else []:
        report.show(table, console)


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
