"""What can be measured: one small file per suite, found by its name.

A file `<name>.py` is the suite `<name>`. Its docstring's first line is what `list` shows, and it
has

    DEFAULTS: dict            fields of `Config` whose default differs here
    NEEDS: set                of "model" and "text": what must be loaded before `tasks`
    tasks(session)            yields `Task`s, in the order they are measured
    tables(config, rows)      returns `Table`s, from what the result files say and nothing else

and, where there is something to say before measuring, `forecast(session)`, which returns `Table`s.
REFERENCE, where it is not the exact cache, names the row that others are compared to. A suite made
of others has `parts(config)`, which returns each one's name and config.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING

from evals.setup.config import ConfigError
from evals.setup.contenders import EXACT
from kvplug.errors import unknown

if TYPE_CHECKING:
    from types import ModuleType

    from evals.measure.session import Session
    from evals.rows.tables import Table
    from evals.setup.config import Config


def names() -> list[str]:
    """Return the suites that the files here add."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> ModuleType:
    """Return a suite, or raise a `ConfigError` that names the nearest."""
    if name not in names():
        raise ConfigError(unknown("suite", name, names()))
    return import_module(f"{__name__}.{name}")


def reference(name: str) -> str:
    """Return the row that a suite's others are compared to."""
    return getattr(get(name), "REFERENCE", EXACT)


def tokens_needed(config: Config) -> int:
    """Return the tokens of text that a run cannot do without, in all of its parts."""
    return max(part.tokens for part in parts(config).values())


def forecast(name: str, session: Session) -> list[Table]:
    """Return what a suite has to say before measuring."""
    suite = get(name)
    return suite.forecast(session) if hasattr(suite, "forecast") else []


def parts(config: Config) -> dict[str, Config]:
    """Return the config of each suite that a run measures, by its name."""
    suite = get(config.suite)
    return suite.parts(config) if hasattr(suite, "parts") else {config.suite: config}
