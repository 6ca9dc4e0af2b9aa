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
MOST = 1 << 32  # tokens of text
LEAST = {"seed": 0, "skip": 0, "warmup": 0, "context": 2, "window": 2}  # others: 1


class ConfigError(ValueError):
    """A run that cannot be: says the value, what is accepted and the nearest match."""


def setting(default: Any, doc: str) -> Any:
    """Return a field with a default and the one line that `--help` shows."""
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Config:
    """One run. Every field is a key of the TOML file and a command-line flag of the same name."""

    suite: str = setting("quick", "what to measure: see `python -m evals list`")
    model: str = setting(
        "packaged",
        "packaged (SmolLM2-135M-Instruct), a Hub id, a local folder; or a real model's sizes with "
        "random weights, for speed and memory: shape:llama-1b, shape:llama-8b, shape:qwen3-8b, "
        "shape:mistral-7b, shape:gemma3-4b, shape:smollm2-1.7b",
    )
    dataset: str | None = setting(
        None,
        "wikitext-2, wikitext-103, pg19, c4, lambada, a Hub id[:config[:split]], a local file or "
        "folder; else WikiText-2, or Python's own docs",
    )
    strategies: tuple[str, ...] = setting(
        STRATEGIES, "rows, with commas between: see `python -m evals list`"
    )
    dtype: str = setting("float32", f"weights and activations: {', '.join(DTYPES)}")
    context: tuple[int, ...] = setting((2048,), "tokens in the cache before decoding")
    batch: tuple[int, ...] = setting((1,), "prompts measured at once")
    decode_steps: int = setting(16, "decode steps timed, each a sample")
    warmup: int = setting(4, "decode steps run before those")
    repeats: int = setting(3, "rounds of a suite that alternates strategies")
    new_tokens: int = setting(48, "tokens generated greedily and compared to the exact cache's")
    windows: int = setting(2, "windows of text for perplexity, KL and top-1 agreement")
    window: int = setting(2048, "tokens in a window")
    chunk: int = setting(64, "tokens fed at once: what is not fed in chunks never reads the cache")
    skip: int = setting(256, "first positions of each window that do not count")
    trials: int = setting(2, "times that every length, depth and number of keys is asked for")
    threads: int | None = setting(None, "CPU threads of torch; without it torch's own choice")
    seed: int = setting(0, "seed of torch and of all random K/V")

    def __post_init__(self) -> None:
        """Refuse what cannot be measured; which suites there are is said by `suites.get`."""
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
