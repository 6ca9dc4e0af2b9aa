"""What a run measures: one frozen dataclass, checked before any work, whose hash names the result
folder.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from kvplug.errors import unknown

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


class ConfigError(ValueError):
    """A run that cannot be: says the value, what is accepted and the nearest match."""


def option(default: Any, doc: str) -> Any:
    """Return a field with a default and the one line that `--help` shows."""
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Config:
    """One run. Every field is a command-line flag of the same name."""

    model: str = option("packaged", "packaged (SmolLM2-135M-Instruct), a Hub id or a local folder")
    dataset: str | None = option(
        None,
        "a Hub id[:config[:split]], a local file or folder; else WikiText-2, or Python's own docs",
    )
    strategies: tuple[str, ...] = option(
        STRATEGIES, "rows, with commas between: see `python -m evals list`"
    )
    dtype: str = option("float32", f"weights and activations: {', '.join(DTYPES)}")
    context: int = option(2048, "tokens of prompt for prefill, decode and greedy agreement")
    batch: int = option(1, "prompts measured at once")
    decode_steps: int = option(32, "decode steps timed, each a sample")
    warmup: int = option(4, "decode steps run before those")
    new_tokens: int = option(48, "tokens generated greedily and compared to the exact cache's")
    windows: int = option(2, "windows of text for perplexity, KL and top-1 agreement")
    window: int = option(2048, "tokens in a window")
    chunk: int = option(64, "tokens fed at once: what is not fed in chunks never reads the cache")
    skip: int = option(256, "first positions of each window that do not count")
    threads: int | None = option(None, "CPU threads of torch; without it torch's own choice")
    seed: int = option(0, "seed of torch; nothing here draws numbers, a strategy may")

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        least = {"seed": 0, "skip": 0, "warmup": 0, "context": 2, "window": 2, "new_tokens": 1}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type.startswith("int") and value is not None and value < least.get(f.name, 1):
                raise ConfigError(
                    f"{f.name}={value}: accepted are whole numbers from {least.get(f.name, 1)}"
                )
        if self.dtype not in DTYPES:
            raise ConfigError(unknown("dtype", self.dtype, list(DTYPES)))
        if self.skip > self.window - 2:  # the last position has no next token to predict
            raise ConfigError(
                f"skip={self.skip}: accepted are 0 to {self.window - 2}, two less than window"
            )
        if not self.strategies:
            raise ConfigError(
                "strategies is empty: name at least one row, `python -m evals list` shows them"
            )

    @property
    def key(self) -> str:
        """Twelve hex digits that two runs share only when every field is equal."""
        text = json.dumps(asdict(self), sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


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
