"""`h2o`: what has been attended to so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..stage import option
from .base import Candidates, Scored

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class H2O(Scored):
    """Keep what drew most attention so far, and the newest half (H2O, arXiv:2306.14048).

    Each query votes once: attention adds up over choices, and what came before a choice counts
    `decay` times as much after it, so that a token of old fame makes room (a departure; 1 is the
    paper's sum). Of a prompt only the newest `every` queries vote: all of them would cost as much
    as its attention once more.
    """

    name: ClassVar[str] = "h2o"
    budget: int = option(1024, "tokens that stay after an eviction", ge=1)
    every: int = option(64, "new tokens between two evictions", ge=1)
    decay: float = option(0.9, "what earlier attention counts, at each choice", ge=0)

    @property
    def queries(self) -> int:
        return self.every

    @property
    def recent(self) -> int:
        return self.budget // 2

    @property
    def least(self) -> int:
        return 1  # half of it, whatever it is

    def score(self, tokens: Candidates) -> Tensor:
        mass = tokens.attention().sum(3).mean(2)  # [B, H, T]
        if "mass" in tokens.state:
            mass += self.decay * tokens.state["mass"]
        tokens.state["mass"] = mass
        return mass
