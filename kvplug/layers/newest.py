"""The newest rows of tensors that grow by a row a step and are seldom read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Newest:
    """Named tensors [B, H, n, ...] in the pieces in which rows came, joined when they are read.

    To add a row costs half of what it does where room is kept for it (`Buffer`).
    """

    def __init__(self) -> None:
        self.pieces: list[dict[str, Tensor]] = []
        self.rows = 0

    def __len__(self) -> int:
        return self.rows

    def append(self, rows: dict[str, Tensor], newest: int) -> None:
        """Add rows [B, H, n, ...] at the end, copied: the newest of them, at most so many."""
        n = _rows(rows)
        if n > newest:
            rows, n = {name: x[:, :, -newest:] for name, x in rows.items()}, newest
        self.pieces.append({name: x.clone() for name, x in rows.items()})
        self.rows += n

    def read(self) -> dict[str, Tensor]:
        """All rows as one; empty where there are none."""
        if len(self.pieces) > 1:
            self.pieces = [
                {name: torch.cat([x[name] for x in self.pieces], dim=2) for name in self.pieces[0]}
            ]
        return self.pieces[0] if self.pieces else {}

    def keep(self, newest: int) -> None:
        """Forget all rows but so many."""
        if self.rows <= newest:
            return
        if not newest:
            self.clear()
            return
        while self.rows - _rows(self.pieces[0]) >= newest:
            self.rows -= _rows(self.pieces.pop(0))
        if gone := self.rows - newest:
            self.pieces[0] = {name: x[:, :, gone:].clone() for name, x in self.pieces[0].items()}
            self.rows = newest

    def drop_last(self, n: int) -> None:
        """Forget the newest n rows."""
        rows = self.read()
        self.load({name: x[:, :, : self.rows - n] for name, x in rows.items()})

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor [B, H, n, ...] by `change` of it, of any B."""
        self.pieces = [{name: change(x) for name, x in self.read().items()}] if self.rows else []

    def load(self, rows: dict[str, Tensor]) -> None:
        """Hold a copy of these rows, of which there may be none, in place of what is held."""
        self.clear()
        if rows and _rows(rows):
            self.append(rows, _rows(rows))

    def clear(self) -> None:
        """Forget everything and give the memory back."""
        self.pieces, self.rows = [], 0


def _rows(piece: dict[str, Tensor]) -> int:
    return next(iter(piece.values())).shape[2]
