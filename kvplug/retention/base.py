"""The contract of retention: which tokens a layer keeps between two calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..stage import Stage

if TYPE_CHECKING:
    from torch import Tensor

    from ..spec import Strategy


@dataclass(frozen=True)
class Retention(Stage):
    """Keep the first `first` real tokens and the `newest` ones, the token that asks included.

    Eviction happens after attention, so a prompt longer than the budget is still read in full
    (evicting before attention corrupts the prefill). Positional methods only set the two numbers;
    `Scored` chooses tokens by content.
    """

    kind: ClassVar[str] = "retention"

    @property
    def first(self) -> int:
        """Tokens kept from the start of every sequence."""
        return 0

    @property
    def newest(self) -> int | None:
        """Length of the window that slides, the newest query counted; None: nothing is dropped."""
        return None


@dataclass(frozen=True)
class Scored(Retention):
    """Keep the `budget` tokens that score highest, chosen anew whenever `every` more have come.

    Subclasses are dataclasses with these two options and `score`; see `examples/plugin` for one in
    ten lines.
    """

    budget: int
    every: int

    def score(self, keys: Tensor, values: Tensor) -> Tensor:
        """How much each token is worth keeping.

        Args:
            keys: [B, H, T, Dk], as stored (rotated where the model rotates).
            values: [B, H, T, Dv].

        Returns:
            [B, H, T], higher is kept.
        """
        raise NotImplementedError

    def keep(self, keys: Tensor, values: Tensor, padding: Tensor) -> Tensor:
        """Indices of the tokens that stay, [B, H, budget], in the order of their positions.

        padding: [B] leading padding tokens still held; they go first, so that transformers' mask,
            which counts from the newest token backwards, stays right for every row.
        """
        score = self.score(keys, values)
        column = torch.arange(score.shape[-1], device=score.device)
        score = score.masked_fill(column < padding[:, None, None], -torch.inf)
        # of equal scores the newer wins, in every row alike, and of padding where a row needs some
        order = score.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., : self.budget]
        return (score.shape[-1] - 1 - order).sort(dim=-1).values

    def conflict(self, strategy: Strategy) -> str | None:
        if (
            strategy.layout.name != "growing"
            or strategy.codec.name != "exact"
            or strategy.placement.name != "device"
        ):
            return (
                f"{self.name!r} picks single tokens out of the cache: it needs growing+exact+device"
            )
        return None
