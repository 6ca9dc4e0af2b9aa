"""The measured front: what strategies lost, where that was measured; `auto` takes nothing else.

`front.json` is written from result folders by `scripts/front.py`. Of codecs it has the drift, which
is what they lose whatever comes. What a method loses that lets tokens go depends on what the text
is for, and was measured for that: words found that the prompt asks for (`prompt`), or that are
asked for later (`prefix`), and drift of a text that goes on (`stream`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .strategy import ALLOWED

if TYPE_CHECKING:
    from .strategy import Auto


@dataclass(frozen=True)
class Drift:
    """KL to the exact cache, nat per token."""

    kl: float

    def allowed(self, drift: str) -> bool:
        """Whether it may be lost."""
        return self.kl <= ALLOWED[drift]

    def __str__(self) -> str:
        return f"KL {self.kl:.5f}"


@dataclass(frozen=True)
class Found:
    """The share of hidden words that were found when they were asked for.

    low, high: its 95 % interval
    exact: the share that the exact cache found
    """

    share: float
    low: float
    high: float
    exact: float

    def allowed(self, drift: str) -> bool:
        """Whether it may be lost: never as "low", since what was not asked for is gone; else where
        no word was lost as far as could be measured.
        """
        return drift == "medium" and self.exact <= self.high

    def __str__(self) -> str:
        return (
            f"{self.share:.2f} [{self.low:.2f}, {self.high:.2f}] of words found, exact "
            f"{self.exact:.2f}"
        )


Loss = Drift | Found


def codecs() -> list[tuple[str, Loss]]:
    """Codecs and what they lose, least first: those that no other beats in drift and in bits."""
    kl, bits = front()["kl"], front()["bits"]
    found: list[str] = []
    for spec in sorted(kl, key=kl.get):
        if not found or bits[spec] < bits[found[-1]]:
            found.append(spec)
    return [(spec, Drift(kl[spec])) for spec in found]


def methods(asked: Auto, context: int) -> list[tuple[str, Loss]]:
    """Strategies that let tokens go, measured for a use; those that keep most of `context` first.

    They keep the shares that were measured, of texts of some length: whether fewer tokens would do
    of a longer one is not known. Where heads have budgets of their own, these are of the model's
    own calibration, or there is none.
    """
    found = []
    for entry in front()["kept"].get(asked.use, {"options": ()})["options"]:
        if "{calibration" in entry["spec"] and asked.calibration is None:
            continue
        loss = Drift(entry["kl"]) if "kl" in entry else Found(*entry["found"], entry["exact"])
        budget = int(entry["share"] * context)
        spec = entry["spec"].format(budget=budget, calibration=asked.calibration)
        found.append((spec, loss))
    return found


@cache
def front() -> dict:
    """`kl` and `bits` of codecs by spec, `kept` by use, and where each was measured."""
    return json.loads(Path(__file__).with_name("front.json").read_text(encoding="utf-8"))
