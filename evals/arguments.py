"""A run's config from what a user wrote: a TOML file, flags, or both.

The keys of both are the fields of `Config`. Flags win over the file; what neither says is the
suite's default, else the field's own.
"""

from __future__ import annotations

import tomllib
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from evals import suites
from evals.setup.config import Config, ConfigError
from kvplug.errors import unknown

if TYPE_CHECKING:
    from pathlib import Path


def configured(flags: dict[str, Any]) -> Config:
    """Return the config of a command line; what comes as text is read as numbers are."""
    file = flags.pop("file")
    kinds = {f.name: f.type for f in fields(Config)}
    for name, text in flags.items():
        if "int" in kinds[name]:
            many = isinstance(text, list)
            words = [word for part in (text if many else [text]) for word in part.split(",")]
            try:
                numbers = [int(word) for word in words if word or not many]
            except ValueError:
                raise ConfigError(f"{name}={','.join(words)}: accepted are whole numbers") from None
            flags[name] = numbers if many else numbers[0]
    return gather(file, flags)


def gather(file: Path | None, given: dict[str, Any]) -> Config:
    """Return the config of a TOML file, or of none, with `given` in place of what it says."""
    values = {name: _typed(name, value) for name, value in (_read(file) | given).items()}
    defaults = suites.get(values.get("suite", Config.suite)).DEFAULTS
    return Config(**(defaults | values))


def _read(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    if file.is_dir():
        results = (file / "env.json").exists()
        what = "a result folder, which `report` renders" if results else "a folder"
        raise ConfigError(f"{file} is {what}; a config is a TOML file")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error


def _typed(name: str, value: Any) -> Any:
    """Return a value as its field wants it: one for many is a tuple of one, text is split."""
    kinds = {f.name: f.type for f in fields(Config)}
    if name not in kinds:
        raise ConfigError(unknown("key", name, list(kinds)))
    kind, many = (int if "int" in kinds[name] else str), kinds[name].startswith("tuple")
    parts = list(value) if isinstance(value, (list, tuple)) and many else [value]
    if many and kind is str:
        parts = [s for x in parts for s in (split_specs(x) if isinstance(x, str) else [x])]
    for part in parts:
        if type(part) is not kind:
            wanted = "a whole number" if kind is int else "text"
            raise ConfigError(f"{name}={part!r}: accepted is {wanted}{' or a list' * many}")
    return tuple(parts) if many else parts[0]


def split_specs(text: str) -> list[str]:
    """Split at commas outside parentheses.

    >>> split_specs("int4,sinks(sinks=4, window=60)+int8")
    ['int4', 'sinks(sinks=4, window=60)+int8']
    """
    specs, depth = [""], 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if char == "," and depth == 0:
            specs.append("")
        else:
            specs[-1] += char
    return [spec.strip() for spec in specs if spec.strip()]
