"""What a layer whose tokens are chosen by content must hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .oracle import Oracle

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..retention.base import Retention


class ChosenOracle(Oracle):
    """`Oracle` for `Scored` retention: which tokens are held it is told, by their positions.

    What it checks is that they are tokens that came, in order, no more than the budget allows, and
    as exact as the codec says. Whether they are the right ones is what tests of a method see.
    """

    def __init__(self, retention: Retention, padding: Tensor) -> None:
        super().__init__(retention, padding)
        self.columns: Tensor | None = None  # [B, H, T], -1 for none, before the next update
        self.before = 0  # tokens seen then
        self.coded: Tensor | None = None  # [B, H, seen] bool, which lie in a block

    def look(self, layer: Any) -> None:
        """Take down what a layer holds, before an update."""
        held = layer.positions.read().get("p") if layer.is_initialized else None
        if self.seen:  # what attention has let settle since
            self.follow(layer)
        self.columns = None if held is None else held.long().clone()
        self.before = self.seen
        if held is None:
            return
        real = held >= 0
        assert ((held.diff(dim=-1) > 0) | ~real[..., :-1]).all(), "out of order"
        waits = self.retention.for_question and self.seen < layer._prompt
        if not (layer.record_past or waits):
            limit = layer.retention.budget + layer.retention.every
            assert held.shape[-1] < limit, f"{held.shape[-1]} tokens held of {limit}"

    def first_visible(self, seen: int | None = None) -> int:
        return 0 if self.columns is None else self.before - self.columns.shape[-1]

    def visible(self, first: int = 0) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Keys and values of what was held and of the new tokens, each with its error."""
        B, H = self.exact.keys.shape[:2]
        columns = torch.arange(self.before, self.seen).expand(B, H, -1)
        if self.columns is not None:
            columns = torch.cat((self.columns, columns), dim=-1)
        hidden = (columns < self.padding[:, None, None])[..., None]

        def take(x: Tensor) -> Tensor:
            index = columns.clamp_min(0)[..., None].expand(-1, -1, -1, x.shape[-1])
            return x.gather(2, index)

        sides = [
            (take(x), take(error).masked_fill(hidden, torch.inf))
            for x, error in (
                (self.exact.keys, self.keys_error),
                (self.exact.values, self.values_error),
            )
        ]
        return sides, torch.zeros(B, columns.shape[-1], dtype=torch.bool)

    def follow(self, layer: Any) -> None:
        _, _, data = layer.encoded()
        B, H = self.exact.keys.shape[:2]
        now = torch.zeros(B, H, self.seen + 1, dtype=torch.bool)  # the last one for none
        was = now.clone()
        if self.coded is not None:
            was[..., : self.coded.shape[-1]] = self.coded
        if data is not None:
            codec = layer.strategy.codec
            n = next(iter(data.values())).shape[2]
            columns = layer.positions.read(0, n * codec.block)["p"].long()
            columns = torch.where(columns < 0, self.seen, columns)
            now.scatter_(2, columns, True)
            for side, error in enumerate((self.keys_error, self.values_error)):
                bound = codec.max_error(data, side)
                shape = (B, H, n, codec.block, error.shape[-1])
                bound = bound.expand(shape).flatten(2, 3).to(error.dtype)
                index = columns[..., None].expand_as(bound)
                spread = error.new_zeros(B, H, self.seen + 1, error.shape[-1])
                spread.scatter_(2, index, bound)
                error += (spread * (now & ~was)[..., None])[:, :, : self.seen]
        self.coded = now[..., : self.seen]

    def crop(self, n: int) -> None:
        super().crop(n)
        if self.coded is not None:
            self.coded = self.coded[..., : self.seen]

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        super().map(change)
        if self.coded is not None:
            self.coded = change(self.coded)
