"""`keynorm`: the tokens with the shortest keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvplug import Candidates, Scored, option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class KeyNorm(Scored):
    """Keep the `budget` tokens with the shortest keys (L2 norm compression, arXiv:2406.11430).

    Short keys draw attention, whatever the query, so they can be chosen without one; rotary
    positions do not change a norm. Departures: the budget is a number of tokens rather than a
    share, and every layer is cut, the first two included, which the paper leaves whole.
    """

    name: ClassVar[str] = "keynorm"
    budget: int = option(1024, "tokens that stay after an eviction", ge=1)
    every: int = option(64, "new tokens between two evictions", ge=1)

    def score(self, tokens: Candidates) -> Tensor:
        return -tokens.keys.float().norm(dim=-1)  # [B, H, T]
