"""`snapkv`: what the end of the prompt attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch.nn.functional import avg_pool1d

from ..errors import SpecError
from ..stage import option
from .base import Candidates, Scored

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SnapKV(Scored):
    """Keep what the newest `window` tokens attend to, and these (SnapKV, arXiv:2404.14469).

    For a prompt whose question stands at its end. Votes are averaged over neighbours, as in the
    paper, so that what surrounds a token stays with it. Departures: one choice per stored head, by
    the mean over the query heads that read it, where the paper's code repeats keys first; and
    tokens are chosen anew while more are generated, by the newest queries of those.
    """

    name: ClassVar[str] = "snapkv"
    for_question: ClassVar[bool] = True
    budget: int = option(1024, "tokens that stay after an eviction", ge=1)
    every: int = option(64, "new tokens between two evictions", ge=1)
    window: int = option(32, "newest tokens that vote, and stay", ge=1)
    pool: int = option(5, "neighbours over which votes are averaged, an odd number", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool % 2 == 0:
            raise SpecError(
                f"{self.name}(pool={self.pool}): pool must be odd, a token in the middle"
            )

    @property
    def queries(self) -> int:
        return self.window

    @property
    def recent(self) -> int:
        return self.window

    def score(self, tokens: Candidates) -> Tensor:
        votes = tokens.attention().mean((2, 3))  # [B, H, T]
        votes[..., -self.window :] = 0  # of the window only its neighbours would hear
        return avg_pool1d(votes, self.pool, stride=1, padding=self.pool // 2)
