"""`lagkv`: tokens unlike those after them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn.functional import pad

from ..stage import option
from .base import Candidates, Scored

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LagKV(Scored):
    """Keep the tokens that differ from what follows them (LagKV, arXiv:2504.04704).

    Tokens are cut into parts of `lag`, and each is measured by the range of the next part: how far
    its channels, scaled by that, spread, for keys and for values. It looks at no query. Departures:
    parts are counted from the newest token, which is in the one that always stays; and all parts
    share one budget, where the paper keeps as many of each.
    """

    name: ClassVar[str] = "lagkv"
    budget: int = option(1024, "tokens that stay after an eviction", ge=1)
    every: int = option(64, "new tokens between two evictions", ge=1)
    lag: int = option(64, "tokens of a part; the newest part stays", ge=2)
    sinks: int = option(4, "first tokens that stay", ge=0)

    @property
    def recent(self) -> int:
        return self.lag

    def score(self, tokens: Candidates) -> Tensor:
        real = self._parts(tokens.real[..., None])  # [B, H, n, lag, 1]
        score = 0
        for side in (tokens.keys, tokens.values):
            parts = self._parts(side.float())  # [B, H, n, lag, D]
            low, high = parts.amin(3, keepdim=True), parts.amax(3, keepdim=True)
            scaled = (parts[:, :, :-1] - low[:, :, 1:]) / (high - low)[:, :, 1:].clamp_min(1e-6)
            spread = scaled.std(-1).masked_fill(~real[:, :, :-1, :, 0], -torch.inf)
            score = score + spread.softmax(-1).nan_to_num()  # within each part
        whole = pad(score.flatten(2), (0, self.lag))
        return whole[..., whole.shape[-1] - tokens.keys.shape[2] :]

    def _parts(self, x: Tensor) -> Tensor:
        """X [B, H, T, D] -> [B, H, n, lag, D], with zeros in front."""
        T = x.shape[2]
        return pad(x, (0, 0, -T % self.lag, 0)).unflatten(2, (-1, self.lag))
