"""The contract of retention: which tokens a layer keeps between two calls."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

import torch

from ..errors import SpecError
from ..stage import Stage, option

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
    log_sum_exp: ClassVar[bool] = False  # whether it wants that of the scores of its `queries`

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

    @property
    def heads(self) -> str | None:
        """A file that says how much each head needs; None: all hold equally many tokens."""
        return None

    def at(self, layer_idx: int, layers: int) -> Retention:
        """What holds in one of so many layers of a model."""
        return self


@dataclass(frozen=True)
class Candidates:
    """What a layer holds once attention has run: the tokens among which a method chooses.

    Tensors may be the layer's own memory, which later tokens overwrite: a method that keeps one
    copies it.

    keys: [B, H, T, Dk] in order of position, rotated where the model rotates; those that are
        encoded come decoded
    values: [B, H, T, Dv]
    positions: [B, H, T] int, the column at which each token came, padding counted; -1 where a row
        has fewer than T
    padding: [B] int, leading padding columns of each row: what has a position before them is no
        token
    queries: [B, Q, n, Dk], the newest ones, as many as the method asks for or as there were; head h
        of the H is read by queries h*Q/H and on. None where it asks for none
    log_sum_exp: [B, Q, n] float32, of the scaled scores of these queries over all they could see;
        None where it does not ask
    scale: of the scores
    state: what `score` has left here at the last choice, by name, [B, H, T, ...] each, and zeros
        for tokens that came since. What it leaves follows the tokens that stay, and every change
        of the batch
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    padding: Tensor
    queries: Tensor | None = None
    log_sum_exp: Tensor | None = None
    scale: float | None = None
    state: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def real(self) -> Tensor:
        """Which of them are tokens, and no padding, [B, H, T] bool."""
        return self.positions >= self.padding[:, None, None]

    @cached_property
    def whole(self) -> bool:
        """Whether all of them are."""
        return bool(self.real.all())

    def attention(self) -> Tensor:
        """What each of the queries gives to each token, [B, H, G, n, T] float32, G = Q / H.

        A query sees the tokens up to its own, and gives 1 in all to those that are still held.
        """
        B, H, T, D = self.keys.shape
        n = self.queries.shape[2]
        queries = self.queries.float().reshape(B, H, -1, D) * self.scale  # [B, H, G * n, D]
        scores = (queries @ self.keys.float().mT).view(B, H, -1, n, T)
        # all but the newest n were there before any of the queries: tokens stand in order
        age = torch.arange(n - 1, -1, -1, device=self.keys.device)[:, None]
        later = self.positions[:, :, None, -n:] > self.positions[:, :, -1:, None] - age
        scores[..., -n:].masked_fill_(later[:, :, None], -torch.inf)
        if self.whole:
            return scores.softmax(-1)
        scores.masked_fill_(~self.real[:, :, None, None], -torch.inf)
        return scores.softmax(-1).nan_to_num_()  # queries of padding see nothing


class Kept(NamedTuple):
    """What stays, in order of position.

    blocks: indices [B, H, n] of blocks
    tokens: indices [B, H, m] of tokens behind the blocks, counted from the first of these
    hidden: [B, H, m] bool, which of `tokens` only fill up a row that keeps fewer, its first; None
        where all keep as many
    cut: [B, H] bool, which rows and heads it was time for, others keep all that they have; None:
        all of them
    """

    blocks: Tensor
    tokens: Tensor
    hidden: Tensor | None = None
    cut: Tensor | None = None


@dataclass(frozen=True)
class Scored(Retention):
    """Keep the `budget` tokens that score highest, chosen anew whenever `every` more have come.

    Subclasses are dataclasses with these two options and `score`; see `examples/plugin` for two in
    a few lines. The first `sinks` tokens of a row and its `recent` newest stay whatever their
    score. Tokens are chosen before they are encoded; of what is encoded already, whole blocks go,
    those whose tokens score lowest on average, so that a block's bytes never change.

    heads: a file of `kvplug calibrate`. Then `budget` is the mean over all heads of the model, and
        each has as much as the file says that it needs of it.
    """

    budget: int
    every: int
    heads: str | None = option(None, "file of `kvplug calibrate`: who needs more", passing=True)
    # Whether it keeps what the end of the prompt asks for. Then nothing goes before that has come,
    # and a cache that is given another prompt says so: what that asks for may be gone.
    for_question: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget <= self.sinks + self.recent:
            raise SpecError(
                f"{self}: budget={self.budget} leaves nothing to choose: the first {self.sinks} "
                f"and the newest {self.recent} tokens always stay; give more than their sum"
            )

    @property
    def drops(self) -> bool:
        return True

    @property
    def sinks(self) -> int:
        """First real tokens of every row that stay."""
        return 0

    @property
    def recent(self) -> int:
        """Newest tokens that stay."""
        return 0

    def last_choice(self, prompt: int, decoded: int) -> tuple[int, int]:
        """Tokens held after the last choice, or after the prompt where there was none, and how many
        have come since, of a prompt seen at once and so many tokens more, one by one.
        """
        held = prompt if prompt < self.budget + self.every else self.budget
        beyond = held + decoded - self.budget
        return (held, decoded) if beyond < self.every else (self.budget, beyond % self.every)

    @property
    def least(self) -> int:
        """The smallest budget that leaves something to choose."""
        return self.sinks + self.recent + 1

    def with_budget(self, budget: int) -> Self:
        """The same method for heads of one budget."""
        return dataclasses.replace(self, budget=budget, heads=None)

    def score(self, tokens: Candidates) -> Tensor:
        """How much each token is worth keeping, [B, H, T]: higher is kept."""
        raise NotImplementedError

    def keep(self, tokens: Candidates, blocks: int | None = None, block: int = 1) -> Kept:
        """Choose `budget` tokens, or up to a block fewer.

        A row is cut when it has `every` tokens more than its budget, whatever the others have, as
        it would be alone; where tokens come to lie in blocks all rows are cut together.

        Args:
            tokens: T of them, of which the first blocks * block are encoded in so many blocks.
            blocks: number of blocks; None: a layer that cuts none.
            block: tokens of each.

        Padding goes first; of equals the newer stays.
        """
        score, real = self._ranked(tokens), tokens.real
        T = score.shape[-1]
        if blocks is None:
            none = score.new_empty(*score.shape[:2], 0, dtype=torch.long)
            if tokens.whole and self.budget + self.every <= T:
                return Kept(none, _highest(score, self.budget))
            held = real.sum(-1)  # [B, H]
            cut = held >= self.budget + self.every
            quota = torch.where(cut, self.budget, held)[..., None]  # [B, H, 1]
            best = _best(score, int(quota.max()))
            # beyond a row's quota they only fill it up, in front
            hidden = torch.arange(best.shape[-1] - 1, -1, -1, device=best.device) >= quota
            order = torch.where(hidden, best - T, best).sort(dim=-1).values
            return Kept(none, order % T, order < 0, cut)
        encoded = blocks * block
        # the mean over what is no padding; a block of padding alone goes first
        of_blocks = score[..., :encoded].unflatten(-1, (blocks, block))
        weight = real[..., :encoded].unflatten(-1, (blocks, block))
        mean = of_blocks.masked_fill(~weight, 0).sum(-1) / weight.sum(-1).clamp_min(1)
        mean = mean.masked_fill(~weight.any(-1), -torch.inf)
        excess, tail = T - self.budget, T - encoded
        # blocks with tokens that stay go last, once the tail cannot spare as many
        loose = int((mean < torch.inf).sum(-1).min()) if blocks else 0
        gone = min(loose, excess // block)
        if tail - (excess - gone * block) < min(tail, self.recent):
            gone = min(blocks, excess // block)
        rest = tail - (excess - gone * block)  # tokens that stay behind blocks
        if gone < blocks and rest < min(tail, self.recent):  # those that stay leave too few to go
            gone, rest = gone + 1, tail
        return Kept(_highest(mean, blocks - gone), _highest(score[..., encoded:], rest))

    def _ranked(self, tokens: Candidates) -> Tensor:
        """Scores [B, H, T], with those of padding lowest and of what always stays highest."""
        positions, padding = tokens.positions, tokens.padding[:, None, None]
        stays = positions > positions[..., -1:] - self.recent
        if self.sinks:
            stays |= positions < padding + self.sinks
        score = self.score(tokens).masked_fill(stays, torch.inf)
        if tokens.whole:
            return score
        return score.masked_fill(~tokens.real, -torch.inf)

    def conflict(self, strategy: Strategy) -> str | None:
        if strategy.layout.limit is not None or strategy.layout.reserves:
            return f"{self.name!r} picks tokens out of the cache: it needs room that grows"
        return None


def _best(score: Tensor, n: int) -> Tensor:
    """Indices [B, H, n] of the highest scores [B, H, T], the best last; of equals the later."""
    return score.argsort(dim=-1, stable=True)[..., score.shape[-1] - n :]


def _highest(score: Tensor, n: int) -> Tensor:
    """The same, rising indices."""
    return _best(score, n).sort(dim=-1).values
