"""`expected`: what queries to come will attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..stage import option
from .base import Candidates, Scored

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Expected(Scored):
    """Keep what queries like the newest will attend to (Expected Attention, arXiv:2510.00636).

    With queries of mean m and covariance C, a key k is attended to in proportion to the mean of
    exp(q k), which is exp(m k + k C k / 2) for normal ones; times the length of its value, which is
    what a token adds. For texts that go on, and prefixes whose question is not known. Departures:
    moments are those of the newest `queries` as attention saw them, rotated, in place of all before
    their rotary turn, turned to positions to come: this asks nothing of a model's positions. The
    newest `recent` tokens stay, beside the paper's first `sinks`.
    """

    name: ClassVar[str] = "expected"
    budget: int = option(1024, "tokens that stay after an eviction", ge=1)
    every: int = option(64, "new tokens between two evictions", ge=1)
    queries: int = option(64, "newest queries whose moments are taken", ge=1)
    sinks: int = option(4, "first tokens that stay", ge=0)
    recent: int = option(64, "newest tokens that stay", ge=0)

    def score(self, tokens: Candidates) -> Tensor:
        H, n = tokens.keys.shape[1], tokens.queries.shape[2]
        queries = tokens.queries.float().unflatten(1, (H, -1)) * tokens.scale  # [B, H, G, n, D]
        mean = queries.mean(3, keepdim=True)
        both = torch.cat((mean, queries - mean), dim=3)  # [B, H, G, 1 + n, D]
        products = both.flatten(2, 3) @ tokens.keys.float().mT
        products = products.unflatten(2, (-1, 1 + n))  # [B, H, G, 1 + n, T]
        # k C k is the mean square of the products with each query's distance from the mean
        spread = products[:, :, :, 1:].square_().mean(3)
        logits = products[:, :, :, 0] + spread / 2  # [B, H, G, T]
        if tokens.whole:
            weights = logits.softmax(-1)
        else:  # of padding alone nothing is expected
            hidden = ~tokens.real[:, :, None]
            weights = logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num()
        return weights.mean(2) * tokens.values.float().norm(dim=-1)
