"""All that is reported of caches, in one folder and under an hour: seven suites, sizes of its own.

The parts are quick, drift, decode, memory, retrieval, generation and use_cache. A row's `suite` is
its part's; config.json has each part's config under `parts`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from evals import suites
from evals.setup.config import STRATEGIES, Config, ConfigError
from evals.setup.contenders import EXACT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evals.measure.session import Session
    from evals.rows.schema import Row
    from evals.rows.tables import Table
    from evals.rows.task import Task

SINKS = "sinks(sinks=4, window=1020)"
DEFAULTS: dict[str, Any] = {"strategies": (*STRATEGIES, SINKS, "int2")}
NEEDS = {"model", "text"}
PARTS: dict[str, dict[str, Any]] = {
    "quick": {},
    "drift": {},
    "decode": {"context": (512, 2048, 6000), "batch": (1, 8), "decode_steps": 6, "warmup": 2},
    "memory": {"context": (512, 2048)},
    "retrieval": {},
    "generation": {},
    "use_cache": {"strategies": (EXACT,), "context": (32, 64, 128)},
}
# unless the run names its contenders: what loses nothing finds what the exact cache finds
RETRIEVAL = (
    EXACT, "window(length=1024)", SINKS, "int8", "int4", "int2", "transformers:quantized",
)  # fmt: skip


def parts(config: Config) -> dict[str, Config]:
    """Return each part's config: the run's, with the part's own sizes in place of the run's."""
    made = {}
    for name, sizes in PARTS.items():
        rows = config.strategies
        if name == "retrieval" and rows == DEFAULTS["strategies"]:
            rows = RETRIEVAL
        own = suites.get(name).DEFAULTS | {"strategies": rows} | sizes
        for field in own.keys() - {"strategies"}:
            if getattr(config, field) != getattr(Config, field):
                raise ConfigError(
                    f"{field}={getattr(config, field)}: suite 'full' has sizes of its own; measure "
                    f"{name!r} by itself with another {field}"
                )
        made[name] = replace(config, suite=name, **own)
    return made


def tasks(session: Session) -> Iterator[Task]:
    """Yield the parts' tasks, one part after another."""
    for name, config in parts(session.config).items():
        part = session.part(config)
        place = {"suite": name, "batch": config.batch[0], "context": config.context[0]}
        *early, last = suites.get(name).tasks(part)
        for task in (*early, replace(last, rows=lambda t=last, p=part: rows_then_free(t, p))):
            yield replace(task, place=place)


def rows_then_free(last: Task, part: Session) -> Iterator[dict[str, Any]]:
    """Yield the rows of a part's last task, and free what the part kept."""
    yield from last.rows()
    part.forget()


def forecast(session: Session) -> list[Table]:
    """Return what parts have to say before measuring."""
    said = []
    for name, config in parts(session.config).items():
        said += suites.forecast(name, session.part(config))
    return said


def tables(config: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Return the parts' tables."""
    made = []
    for name, part in config["parts"].items():
        if own := [row for row in rows if row["suite"] == name]:
            told = suites.get(name).tables(part, own)
            made += [table._replace(title=f"{name}: {table.title}".rstrip(": ")) for table in told]
    return made
