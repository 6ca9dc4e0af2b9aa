"""`tova`: what the newest token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..stage import option
from .base import Candidates, Scored

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Tova(Scored):
    """Keep what the newest token attends to most (TOVA, arXiv:2401.06104).

    As in the paper all heads of a layer share one choice, by the mean of their weights. Departure:
    a choice is made once in `every` tokens, not at each.
    """

    name: ClassVar[str] = "tova"
    for_question: ClassVar[bool] = True
    budget: int = option(1024, "tokens that stay after an eviction", ge=1)
    every: int = option(64, "new tokens between two evictions", ge=1)

    @property
    def queries(self) -> int:
        return 1

    def score(self, tokens: Candidates) -> Tensor:
        votes = tokens.attention().mean((1, 2, 3))  # [B, T]
        return votes[:, None].expand(tokens.positions.shape)
