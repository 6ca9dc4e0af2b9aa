"""`lookback`: the tokens that the newest queries attend to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

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
    budget: int = option(1024, "tokens that stay after an eviction", ge=1)
    every: int = option(64, "new tokens between two evictions", ge=1)
    queries: int = option(8, "newest queries that are asked", ge=1)

    def score(self, tokens: Candidates) -> Tensor:
        H = tokens.keys.shape[1]
        keys, queries = tokens.keys.float(), tokens.queries.float()
        queries = queries.unflatten(1, (H, -1))  # [B, H, G, n, Dk]
        scores = torch.einsum("bhgnd,bhtd->bhgnt", queries, keys) * tokens.scale
        # a query sees what came before it, and itself
        age = torch.arange(queries.shape[3], device=keys.device).flip(0)[:, None]
        newest = tokens.positions.amax(-1, keepdim=True)[..., None]  # [B, H, 1, 1]
        seen = tokens.positions[:, :, None] <= newest - age  # [B, H, n, T]
        weights = scores.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1)
        return weights.mean((2, 3))
