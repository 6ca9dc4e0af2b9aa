"""`auto`: a strategy chosen for a model, a length and the memory there is; `recommend` shows it.

What a strategy loses is read from the measured front (`measured.py`); what was not measured is not
chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from . import measured, memory
from .errors import MissingExtra, SpecError
from .estimate import estimate
from .spec import parse
from .strategy import Auto
from .units import bytes_of, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .measured import Loss
    from .strategy import Strategy

DECODED = 65  # tokens, one of them the first of a block: by then room has grown once
SHARE = 0.8  # of what is free: the model's activations want the rest


NOTHING = measured.Drift(0.0)


@dataclass(frozen=True)
class Option:
    """One strategy: what it loses, whether that is allowed, the bytes it would hold, or why it
    cannot be.
    """

    spec: str
    loss: Loss
    allowed: bool
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
        allowed = [x for x in served if x.allowed]
        barred = [x for x in served if not x.allowed]
        smaller = min(barred, key=lambda x: x.held, default=None)
        other = (
            f"{smaller.spec!r} would hold {text_of(smaller.held)} at {smaller.loss}, which "
            f"drift={self.asked.drift!r} does not allow"
            if smaller
            else "nothing smaller was measured"
        )
        if self.asked.use and not measured.methods(self.asked, 1):
            other += f"; no method was measured that lets tokens go for use={self.asked.use!r}"
            if self.asked.use == "prefix" and self.asked.calibration is None:
                other += " without calibration=, a file of `kvplug calibrate`"
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
    use: str | None = None,
    drift: str = "none",
    calibration: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> Choice:
    """What `cache_implementation="auto(budget=..., use=..., drift=...)"` would choose, among what.

    Args:
        config: of the model; no weights are needed.
        context: tokens in all, prompt and answer.
        batch: rows.
        budget: bytes that the cache may hold, as "4GiB"; None: 0.8 of what `device` has free.
        use: what for, without which no token goes: "prompt", one question that stands in the
            prompt; "prefix", questions that come later; "stream", a text that goes on.
        drift: what may be lost: "none"; "low", 0.003 nat per token of KL to the exact cache; or
            "medium", 0.03, and of words that questions ask for none, as far as was measured on the
            model that `front.json` names.
        calibration: file of `kvplug calibrate`: with it `use="prefix"` and "stream" take budgets of
            its heads.
        dtype: of keys and values, or its name; default: the config's, else float32.
        device: on which the model runs.

    Raises SpecError for arguments that cannot be, and where nothing serves the model.
    """
    asked = Auto(budget, use, drift, calibration)
    return choose(asked, config, context=context, batch=batch, dtype=dtype, device=device)


def choose(
    asked: Auto,
    config: PreTrainedConfig,
    *,
    context: int,
    batch: int,
    dtype: torch.dtype | str | None,
    device: torch.device | str,
    decoded: int | None = None,
) -> Choice:
    """The choice for a model; the other arguments and errors are those of `recommend`.

    decoded: how many of `context` tokens come one by one; None: nobody knows
    """
    few = min(DECODED, context - 1)
    if decoded is None:
        decoded = few
    device = torch.device(device)
    budget = bytes_of(asked.budget) if asked.budget else int(memory.free(device) * SHARE)
    beside = 0 if device.type == "cpu" else int(memory.free(torch.device("cpu")) * SHARE)
    of = {"context": context, "batch": batch, "dtype": dtype}
    options = []
    for spec, loss in candidates(asked, context, device):
        allowed = loss.allowed(asked.drift)
        try:
            # where all tokens stay more would take long to count, and change little
            singly = decoded if parse(spec).retention.drops else min(decoded, few)
            held = estimate(spec, config, **of, decoded=singly)
        except (SpecError, MissingExtra) as e:
            options.append(Option(spec, loss, allowed, None, False, str(e)))
            continue
        here = held
        if not parse(spec).placement.on_device:  # a layer's blocks, and the next one's
            here = 2 * held // config.get_text_config(decoder=True).num_hidden_layers
        fits = here <= budget and (here == held or held <= beside)
        options.append(Option(spec, loss, allowed, held, fits))
    allowed = [x for x in options if x.allowed]
    if all(x.held is None for x in allowed):
        raise SpecError(f"{asked}: nothing serves this model: {options[0].refusal}")
    best = next((x for x in allowed if x.fits), None)
    return Choice(asked, budget, f"{batch} x {context:,} tokens", tuple(options), best)


def candidates(asked: Auto, context: int, device: torch.device) -> list[tuple[str, Loss]]:
    """Strategies and what they lose, in the order in which they are taken.

    Exact first, then codecs by drift, then what lets tokens go; then the same, but for the last,
    with blocks in host memory, where that is another.
    """
    coded = measured.codecs()
    here = [("growing", NOTHING), *coded, *measured.methods(asked, context)]
    if device.type == "cpu":
        return here
    on_host = [(f"{spec}+host", loss) for spec, loss in coded]
    return [*here, ("host", NOTHING), *on_host]  # slower than what is on the device
