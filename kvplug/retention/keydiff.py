"""`keydiff`: keys unlike the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch.nn.functional import cosine_similarity, normalize

from ..stage import option
from .base import Candidates, Scored

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class KeyDiff(Scored):
    """Keep the tokens whose keys point away from the mean of all (KeyDiff, arXiv:2504.15364).

    It looks at no query, so any attention will do, and costs least of all. Departures: the newest
    `recent` tokens stay, of which the paper says nothing, since what is to come is about them; and
    tokens are chosen once in `every`, where the paper does so after each block of a prompt.
    """

    name: ClassVar[str] = "keydiff"
    budget: int = option(1024, "tokens that stay after an eviction", ge=1)
    every: int = option(64, "new tokens between two evictions", ge=1)
    recent: int = option(32, "newest tokens that stay", ge=0)

    def score(self, tokens: Candidates) -> Tensor:
        directions = normalize(tokens.keys.float(), dim=-1)  # [B, H, T, Dk]
        anchor = (directions * tokens.real[..., None]).sum(2, keepdim=True)
        return -cosine_similarity(directions, anchor, dim=-1)
