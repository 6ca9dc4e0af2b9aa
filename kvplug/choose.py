"""`auto`: a strategy chosen for a model, a length and the memory there is; `recommend` shows it.

What each codec costs in drift is read from `front.json`, the measured front: written from a result
folder by `scripts/front.py`. A codec that was not measured is not chosen.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import memory
from .errors import MissingExtra, SpecError
from .estimate import estimate
from .spec import parse
from .strategy import Auto
from .units import bytes_of, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .strategy import Strategy

logger = logging.getLogger("kvplug")

DECODED = 65  # tokens, one of them the first of a block: by then room has grown once
SHARE = 0.8  # of what is free: the model's activations want the rest


@dataclass(frozen=True)
class Option:
    """One strategy: its drift (KL, nat per token), the bytes it would hold, or why it cannot be."""

    spec: str
    kl: float
    held: int | None
    fits: bool
    refusal: str = ""


@dataclass(frozen=True)
class Choice:
    """What `auto` has found: `best` of `options`, in their order; None where nothing fits."""

    asked: Auto
    budget: int
    size: str
    options: tuple[Option, ...]
    best: Option | None

    @property
    def strategy(self) -> Strategy:
        """The strategy; SpecError where none that is allowed fits, saying what would."""
        if self.best is None:
            raise SpecError(f"{self.asked}: {self.reason}")
        return parse(self.best.spec)

    @property
    def reason(self) -> str:
        """Why this one, in one line, and what a lossy one would have saved."""
        served = [x for x in self.options if x.held is not None]
        allowed = [x for x in served if self.asked.allows(x.kl)]
        barred = [x for x in served if x not in allowed]
        smaller = min(barred, key=lambda x: x.held, default=None)
        other = (
            f"{smaller.spec!r} would hold {text_of(smaller.held)} at KL {smaller.kl:.4f}, which "
            f"drift={self.asked.drift!r} does not allow"
            if smaller
            else "nothing smaller was measured"
        )
        if self.best is None:
            least = min(allowed, key=lambda x: x.held)
            return (
                f"nothing that is allowed fits {text_of(self.budget)}: {least.spec!r} would hold "
                f"{text_of(least.held)} for {self.size}; {other}"
            )
        larger = [x.spec for x in allowed[: allowed.index(self.best)]]
        why = f"{', '.join(larger)} would not fit" if larger else "nothing is lost"
        return (
            f"{self.best.spec}: {text_of(self.best.held)} of {text_of(self.budget)} for "
            f"{self.size}; {why}; {other}"
        )


def recommend(
    config: PreTrainedConfig,
    *,
    context: int,
    batch: int = 1,
    budget: str | None = None,
    drift: str = "none",
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> Choice:
    """What `cache_implementation="auto(budget=..., drift=...)"` would choose, and among what.

    Args:
        config: of the model; no weights are needed.
        context: tokens in all, prompt and answer.
        batch: rows.
        budget: bytes that the cache may hold, as "4GiB"; None: 0.8 of what `device` has free.
        drift: what may be lost, in KL to the exact cache: "none", "low" (0.003 nat per token) or
            "medium" (0.03), as measured on the model that `front.json` names.
        dtype: of keys and values, or its name; default: the config's, else float32.
        device: on which the model runs.

    Raises SpecError for arguments that cannot be, and where nothing serves the model.
    """
    asked = Auto(budget, drift)
    return choose(asked, config, context=context, batch=batch, dtype=dtype, device=device)


def choose(
    asked: Auto,
    config: PreTrainedConfig,
    *,
    context: int,
    batch: int,
    dtype: torch.dtype | str | None,
    device: torch.device | str,
) -> Choice:
    """The choice for a model; the other arguments and errors are those of `recommend`."""
    device = torch.device(device)
    budget = bytes_of(asked.budget) if asked.budget else int(memory.free(device) * SHARE)
    beside = 0 if device.type == "cpu" else int(memory.free(torch.device("cpu")) * SHARE)
    of = {"context": context, "batch": batch, "dtype": dtype, "decoded": min(DECODED, context - 1)}
    options = []
    for spec, kl in candidates(device):
        try:
            held = estimate(spec, config, **of)
        except (SpecError, MissingExtra) as e:
            options.append(Option(spec, kl, None, False, str(e)))
            continue
        here = held
        if not parse(spec).placement.on_device:  # a layer's blocks, and the next one's
            here = 2 * held // config.get_text_config(decoder=True).num_hidden_layers
        fits = here <= budget and (here == held or held <= beside)
        options.append(Option(spec, kl, held, fits))
    allowed = [x for x in options if asked.allows(x.kl)]
    if all(x.held is None for x in allowed):
        raise SpecError(f"{asked}: nothing serves this model: {options[0].refusal}")
    best = next((x for x in allowed if x.fits), None)
    return Choice(asked, budget, f"{batch} x {context:,} tokens", tuple(options), best)


def candidates(device: torch.device) -> list[tuple[str, float]]:
    """Strategies and their drift, in the order in which they are taken.

    Exact first, then by drift; then the same with blocks in host memory, where that is another.
    """
    drift = front()["kl"]
    coded = sorted(drift.items(), key=lambda x: x[1])
    if device.type == "cpu":
        return [("growing", 0.0), *coded]
    on_host = [(f"{spec}+host", kl) for spec, kl in coded]
    return [("growing", 0.0), *coded, ("host", 0.0), *on_host]  # slower than what is on the device


@cache
def front() -> dict:
    """The measured front: `kl` of codecs by spec, and where that was measured."""
    return json.loads(Path(__file__).with_name("front.json").read_text(encoding="utf-8"))
