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

    @property
    def drops(self) -> bool:
        """Whether it drops anything, some time."""
        return self.newest is not None

    @property
    def queries(self) -> int:
        """How many of the newest queries it wants to see once attention has run; 0: none."""
        return 0


@dataclass(frozen=True)
class Candidates:
    """What a layer holds once attention has run: the tokens among which a method chooses.

    Tensors may be the layer's own memory, which later tokens overwrite: a method that keeps one
    copies it.

    keys: [B, H, T, Dk] in order of position, rotated where the model rotates; those that are
        encoded come decoded
    values: [B, H, T, Dv]
    positions: [B, H, T] int, the column at which each token came, padding counted
    padding: [B] int, leading padding columns of each row: tokens before them are padding
    queries: [B, Q, n, Dk], the newest ones, as many as the method asks for or as there were; head h
        of the H is read by queries h*Q/H and on. None where it asks for none
    log_sum_exp: [B, Q, n] float32, of the scaled scores of these queries over all they could see;
        None where it does not ask
    scale: of the scores
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    padding: Tensor
    queries: Tensor | None = None
    log_sum_exp: Tensor | None = None
    scale: float | None = None


@dataclass(frozen=True)
class Scored(Retention):
    """Keep the `budget` tokens that score highest, chosen anew whenever `every` more have come.

    Subclasses are dataclasses with these two options and `score`; see `examples/plugin` for two in
    a few lines. Tokens are chosen before they are encoded; of what is encoded already, whole blocks
    go, those whose tokens score lowest on average, so that a block's bytes never change.
    """

    budget: int
    every: int
    log_sum_exp: ClassVar[bool] = False  # whether `score` wants it, for the queries it asks for

    @property
    def drops(self) -> bool:
        return True

    def score(self, tokens: Candidates) -> Tensor:
        """How much each token is worth keeping, [B, H, T]: higher is kept."""
        raise NotImplementedError

    def keep(self, tokens: Candidates, blocks: int = 0, block: int = 1) -> tuple[Tensor, Tensor]:
        """Choose `budget` tokens, or up to a block fewer.

        Args:
            tokens: T of them, of which the first blocks * block are encoded in so many blocks.
            blocks: number of blocks.
            block: tokens of each.

        Returns:
            indices of blocks that stay [B, H, n] and of tokens behind them [B, H, m], counted from
            the first of these, both in order of position. Padding goes first; of equals the newer
            stays.
        """
        score = self.score(tokens).masked_fill(
            tokens.positions < tokens.padding[:, None, None], -torch.inf
        )
        encoded = blocks * block
        excess = score.shape[-1] - self.budget
        gone = min(blocks, excess // block)
        rest = score.shape[-1] - encoded - (excess - gone * block)  # tokens that stay behind blocks
        if rest < 0:  # fewer than must go
            gone, rest = gone + 1, score.shape[-1] - encoded
        of_blocks = score[..., :encoded].unflatten(-1, (blocks, block)).mean(-1)
        return _highest(of_blocks, blocks - gone), _highest(score[..., encoded:], rest)

    def conflict(self, strategy: Strategy) -> str | None:
        if strategy.layout.limit is not None or strategy.layout.reserves:
            return f"{self.name!r} picks tokens out of the cache: it needs room that grows"
        return None


def _highest(score: Tensor, n: int) -> Tensor:
    """Indices [B, H, n] of the highest scores [B, H, T], rising; of equals the later ones."""
    order = score.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :n]
    return (score.shape[-1] - 1 - order).sort(dim=-1).values
