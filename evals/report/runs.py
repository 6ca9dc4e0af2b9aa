"""A run as read from its folder, and which runs belong together."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evals import suites
from evals.rows.noise import Noise
from evals.rows.schema import Row, label
from evals.rows.store import load_rows

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Run:
    """What the files of a result folder say of one suite.

    Every row has an `anchor`, unique in a report.
    """

    number: int
    key: str
    suite: str
    config: dict[str, Any]
    env: dict[str, Any]
    rows: list[Row]
    drift: dict[str, dict[str, Any]]  # by strategy, the whole answer of the kv_drift metric

    @property
    def reference(self) -> str:
        """The row that the others are compared to."""
        return suites.reference(self.suite)

    @property
    def noise(self) -> Noise:
        """How far the reference is from itself."""
        return Noise(self.rows, self.reference)

    @property
    def title(self) -> str:
        """The suite, what it read, and the key."""
        return " · ".join(
            part for part in (self.suite, short(self.env["dataset"]), self.key) if part
        )


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[Row]]:
    """Return config, environment and rows of a run, finished or not.

    Rows come in the order of the config's strategies, also where a failed one was measured again
    later: the reference first, controls and other baselines last.
    """
    config, env = (_json(folder / name) for name in ("config.json", "env.json"))
    rows = load_rows(folder / "rows.jsonl")
    place = {name: number for number, name in enumerate(config["strategies"])}
    place[suites.reference(config["suite"])] = -1

    def order(row: Row) -> int:
        name = row["strategy"]  # one that is in the config, or that with a kernel added
        return place.get(name, place.get(name.rpartition("+")[0], len(place)))

    return config, env, sorted(rows, key=order)


def load(folders: list[Path]) -> list[Run]:
    """Return the runs of result folders: one each, or one per part of a suite made of others."""
    made: list[Run] = []
    for folder in folders:
        config, env, rows = read(folder)
        answers = [_json(path) for path in sorted(folder.glob("drift/*.json"))]
        drift = {answer["strategy"]: answer for answer in answers}
        key = rows[0]["run"] if rows else folder.name
        parts = _parts(config)
        for suite, part in parts.items():
            own = drift if suite == "drift" or len(parts) == 1 else {}  # one file for two parts
            number, mine = len(made), [row for row in rows if row["suite"] == suite]
            anchored = [row | {"anchor": f"r{number}-{i}"} for i, row in enumerate(mine)]
            made.append(Run(number, key, suite, part, env, anchored, own))
    return made


def _parts(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return config.get("parts") or {config["suite"]: config}


def together(runs: list[Run]) -> list[list[Run]]:
    """Return groups of runs whose figures may be read side by side.

    They share model, dtype, hardware, threads and dataset; a suite that reads no text or no model
    goes with any.
    """
    groups: dict[tuple, list[Run]] = {}
    for run in sorted(runs, key=lambda run: _subject(run).count(None)):
        mine = _subject(run)
        fitting = [subject for subject in groups if _fits(mine, subject)]
        for subject in fitting or [mine]:
            groups.setdefault(subject, []).append(run)
    return list(groups.values())


def subject(runs: list[Run]) -> str:
    """Return what runs that belong together measured, and on what."""
    env, config = runs[0].env, runs[0].config
    parts = [short(env["model"]), config["dtype"], env["hardware"], _threads(env["threads"])]
    return " · ".join(part for part in (*parts, short(env["dataset"])) if part)


def _threads(number: int) -> str:
    return f"{number} thread{'s' * (number != 1)}"


def short(fingerprint: str | None) -> str:
    """Return a fingerprint's name.

    >>> short("wiki.test.raw sha256:bbf94c53a05abe9e")
    'wiki.test.raw'
    """
    return (fingerprint or "").partition(" sha256:")[0]


def where(row: Row) -> str:
    """Return a row's batch, context and case as text."""
    case = f", {label(row['case'])}" if row["case"] else ""
    return f"batch {row['batch']}, {row['context']:,} tokens{case}"


def _subject(run: Run) -> tuple:
    env = run.env
    return env["model"], env["dataset"], run.config["dtype"], env["hardware"], env["threads"]


def _fits(one: tuple, other: tuple) -> bool:
    return all(a is None or a == b for a, b in zip(one, other, strict=True))


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
