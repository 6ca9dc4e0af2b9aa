"""`lookback`: the tokens that the newest queries attend to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvplug import Candidates, Scored, option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LookBack(Scored):
    """Keep the `budget` tokens with most attention from the newest queries, per stored head.

    The idea of SnapKV (arXiv:2404.14469) without its pooling, and of TOVA (arXiv:2401.06104), which
    looks at the newest query alone.
    """

    name: ClassVar[str] = "lookback"
    for_question: ClassVar[bool] = True  # of which the prompt's end is: until then nothing goes
    budget: int = option(1024, "tokens that stay after an eviction", ge=1)
    every: int = option(64, "new tokens between two evictions", ge=1)
    queries: int = option(8, "newest queries that are asked", ge=1)

    def score(self, tokens: Candidates) -> Tensor:
        return tokens.attention().mean((2, 3))  # [B, H, T]
