"""The folder of one run, `results/<config hash>/`: config and environment first, rows as measured.

Rows are written one at a time and reach the disk before the next is measured. After an interrupt
the same command goes on: tasks that finished are not measured again, rows of the one that did not,
or that failed, are dropped, and a last line that was cut off too. Rows of another config are in
another folder; rows measured in another environment are refused.

Where several processes measure, each but the main one appends to a file of its own, `rows.N.jsonl`,
which the main one takes into `rows.jsonl`; whoever reads the rows reads both.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import evaluate

from evals.setup.config import ConfigError
from kvplug import atomic

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from evals.rows.schema import Row


class WriteFailed(RuntimeError):
    """A result could not be written: the run stops, since what it measures would be lost."""


class Shard:
    """What one process adds to a run's folder."""

    def __init__(self, folder: Path, process: int) -> None:
        self.folder = folder
        self.path = folder / (f"rows.{process}.jsonl" if process else "rows.jsonl")

    def append(self, row: Row) -> None:
        """Write one row, and have the disk say that it is there."""
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())

    def save(self, kind: str, name: str, **result: Any) -> None:
        """Save the whole answer of an `evaluate` metric as `<kind>/<name>.json`."""
        with writing(self.folder / kind):
            (self.folder / kind).mkdir(exist_ok=True)
            path = self.folder / kind / f"{name}.json"
            evaluate.save(path, **result)
            answer = json.loads(path.read_text("utf-8"))
            del answer["_interpreter_path"]  # a result says nothing of its author's folders
            _write(path, answer)


class Results(Shard):
    """The files of a run, and which of its tasks are finished: for the main process only."""

    def __init__(self, folder: Path, config: dict[str, Any], env: dict[str, Any]) -> None:
        """Make the folder, or take up the one that is there."""
        super().__init__(folder, 0)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            rows = load_rows(self.path)
            if rows:
                for name, now in (("config.json", config), ("env.json", env)):
                    _check_same(folder, json.loads((folder / name).read_text("utf-8")), now)
            _write(folder / "config.json", config)
            _write(folder / "env.json", env)
        self.finished = _finished(rows)
        self._keep(row for row in rows if row["task"] in self.finished)

    def merge(self) -> None:
        """Take in what the other processes appended."""
        if _shards(self.path):
            self._keep(load_rows(self.path))

    def _keep(self, rows: Iterable[Row]) -> None:
        """Have these rows and no others, all in the one file."""
        with writing(self.path):
            atomic.write(self.path, "".join(map(_line, rows)).encode())
            for path in _shards(self.path):
                path.unlink()


def discard(folder: Path) -> None:
    """Delete a run's results."""
    with writing(folder):
        if folder.exists():
            shutil.rmtree(folder)


def load_rows(path: Path) -> list[Row]:
    """Return the rows of a file and of those that other processes left beside it, without last
    lines that were cut off.
    """
    rows: dict[str, Row] = {}  # a line that was taken in, and whose file was not yet deleted, once
    for part in [path] * path.exists() + _shards(path):
        lines = part.read_text(encoding="utf-8", errors="replace").split("\n")
        for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is cut off
            try:
                rows[line] = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{part}, line {number} is damaged: {error}") from error
    return list(rows.values())


def _shards(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}.*{path.suffix}"))


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turn an error of the file system into `WriteFailed`."""
    try:
        yield
    except OSError as error:
        raise WriteFailed(f"cannot write {what}: {error}; the run stops here") from error


def _finished(rows: list[Row]) -> set[str]:
    """Return the tasks whose last row is there, and none of whose rows failed."""
    failed = {row["task"] for row in rows if row["status"] == "failed"}
    return {row["task"] for row in rows if row["done"]} - failed


def _check_same(folder: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in json.loads(json.dumps(now)).items():  # as a file has it: lists, no tuples
        if was.get(name) != value:
            raise ConfigError(
                f"{folder} has rows measured with {name} {was.get(name)!r}, now it is {value!r}: "
                "figures of both do not belong in one table. --again discards those rows, "
                "another --out keeps them."
            )


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _write(path: Path, value: dict[str, Any]) -> None:
    """Write strict JSON that a person can read."""
    atomic.write(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())
