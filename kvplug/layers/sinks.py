"""The first tokens of every row, kept as they came: attention sinks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .buffer import lasting

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from .rotation import Turn


class SinkTokens:
    """The first `count` real tokens of each row, in full precision and as they first came.

    Rows of a left-padded batch start at different columns and overflow at different times: a row
    whose real tokens all fit still shows its own tokens where another row shows its sinks.
    """

    def __init__(self, count: int, turn: Turn | None) -> None:
        """Take how many, and how the model turns what it stores; None: not at all."""
        self.count, self.turn = count, turn or (None, None)
        self.keys: Tensor | None = None  # [B, H, count, Dk]
        self.values: Tensor | None = None  # [B, H, count, Dv]

    def capture(self, keys: Tensor, values: Tensor, seen: int, padding: Tensor) -> None:
        """Take what is ours of new tokens, of which the first stands at column `seen`.

        keys [B, H, S, Dk], values [B, H, S, Dv]; padding [B]: leading padding tokens of each row.
        """
        if self.keys is None:
            self.keys = keys.new_zeros(*keys.shape[:2], self.count, keys.shape[-1])
            self.values = values.new_zeros(*values.shape[:2], self.count, values.shape[-1])
        sinks = torch.arange(self.count, device=padding.device)
        column = padding[:, None] + sinks - seen  # [B, count], among the new tokens
        here = ((column >= 0) & (column < keys.shape[2]))[:, None, :, None]
        column = column.clamp(0, keys.shape[2] - 1)[:, None, :, None]
        with lasting():
            self.keys = torch.where(here, _gather(keys, column), self.keys)
            self.values = torch.where(here, _gather(values, column), self.values)

    def at(
        self, column: int, n: int, padding: Tensor, own: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """The first n, keys and values [B, H, n, D], for the columns `column` and on.

        own: reads what rows that have not overflowed have there themselves; called only where there
            are such rows.
        """
        by = column - padding
        with lasting():  # a rotation remembers its angles
            keys, values = (
                x[:, :, :n] if rotation is None else rotation.shift(x[:, :, :n], by)
                for x, rotation in zip((self.keys, self.values), self.turn, strict=True)
            )
        overflowed = by > 0
        if not bool(overflowed.all()):
            own_keys, own_values = own()
            overflowed = overflowed[:, None, None, None]
            return torch.where(overflowed, keys, own_keys), torch.where(
                overflowed, values, own_values
            )
        return keys, values

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch."""
        if self.keys is not None:
            self.keys, self.values = change(self.keys), change(self.values)

    def clear(self) -> None:
        """Forget the tokens."""
        self.keys = self.values = None


def _gather(x: Tensor, column: Tensor) -> Tensor:
    """X [B, H, S, D] at column [B, 1, count, 1] -> [B, H, count, D]."""
    return x.gather(2, column.expand(-1, x.shape[1], -1, x.shape[-1]))
