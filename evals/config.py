"""What a run measures: one frozen dataclass, checked before any work, whose hash names the result
folder.

Values come from a TOML file of the same keys and from the command line, which wins; what neither
says is the suite's default, else the one written here.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from evals import suites
from kvplug.errors import unknown

if TYPE_CHECKING:
    from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")
STRATEGIES = (
    "transformers:dynamic",
    "growing",
    "kvplug:static",
    "window(length=1024)",
    "int8",
    "int4",
    "host",
    "transformers:static",
    "transformers:quantized",
)
MOST = 1 << 32  # tokens of text
LEAST = {"seed": 0, "skip": 0, "warmup": 0, "context": 2, "window": 2}  # others: 1


class ConfigError(ValueError):
    """A run that cannot be: says the value, what is accepted and the nearest match."""


def option(default: Any, doc: str) -> Any:
    """Return a field with a default and the one line that `--help` shows."""
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Config:
    """One run. Every field is a key of the TOML file and a command-line flag of the same name."""

    suite: str = option("quick", "what to measure: see `python -m evals list`")
    model: str = option(
        "packaged",
        "packaged (SmolLM2-135M-Instruct), a Hub id, a local folder, or shape:llama-1b and others: "
        "random weights",
    )
    dataset: str | None = option(
        None,
        "wikitext-2, wikitext-103, pg19, c4, lambada, a Hub id[:config[:split]], a local file or "
        "folder; else WikiText-2, or Python's own docs",
    )
    strategies: tuple[str, ...] = option(
        STRATEGIES, "rows, with commas between: see `python -m evals list`"
    )
    dtype: str = option("float32", f"weights and activations: {', '.join(DTYPES)}")
    context: tuple[int, ...] = option((2048,), "tokens in the cache before decoding")
    batch: tuple[int, ...] = option((1,), "prompts measured at once")
    decode_steps: int = option(16, "decode steps timed, each a sample")
    warmup: int = option(4, "decode steps run before those")
    repeats: int = option(3, "rounds of a suite that alternates strategies")
    new_tokens: int = option(48, "tokens generated greedily and compared to the exact cache's")
    windows: int = option(2, "windows of text for perplexity, KL and top-1 agreement")
    window: int = option(2048, "tokens in a window")
    chunk: int = option(64, "tokens fed at once: what is not fed in chunks never reads the cache")
    skip: int = option(256, "first positions of each window that do not count")
    trials: int = option(2, "times that every length, depth and number of keys is asked for")
    threads: int | None = option(None, "CPU threads of torch; without it torch's own choice")
    seed: int = option(0, "seed of torch and of all random K/V")

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if self.suite not in suites.names():
            raise ConfigError(unknown("suite", self.suite, suites.names()))
        for f in fields(self):
            value = getattr(self, f.name)
            if "int" in f.type and value is not None:
                least = LEAST.get(f.name, 1)
                for number in value if isinstance(value, tuple) else (value,):
                    if number < least:
                        raise ConfigError(
                            f"{f.name}={number}: accepted are whole numbers from {least}"
                        )
            if value == ():
                raise ConfigError(f"{f.name} is empty: give at least one")
        if self.tokens > MOST:
            raise ConfigError(
                f"{self.tokens:,} tokens of text would be needed (batch x context, or windows x "
                f"window): accepted are {MOST:,}"
            )
        if self.dtype not in DTYPES:
            raise ConfigError(unknown("dtype", self.dtype, list(DTYPES)))
        if self.skip > self.window - 2:  # the last position has no next token to predict
            raise ConfigError(
                f"skip={self.skip}: accepted are 0 to {self.window - 2}, two less than window"
            )

    @property
    def tokens(self) -> int:
        """The tokens of text that this run cannot do without."""
        return max(max(self.batch) * max(self.context), self.windows * self.window)

    @property
    def key(self) -> str:
        """Twelve hex digits that two runs share only when every field is equal."""
        text = json.dumps(asdict(self), sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def gather(file: Path | None, given: dict[str, Any]) -> Config:
    """Return the config of a TOML file, or of none, with `given` in place of what it says."""
    values = {name: _typed(name, value) for name, value in (_read(file) | given).items()}
    suite = values.get("suite", Config.suite)
    defaults = suites.get(suite).DEFAULTS if suite in suites.names() else {}
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
