"""A layer's content as attention sees it in one call: what every kernel reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ..codecs.base import Codec, Encoded


@dataclass(frozen=True)
class Stored:
    """Columns of attention in order: first tokens, encoded blocks, full-precision tail.

    head: keys [B, H, F, Dk] and values [B, H, F, Dv] of the first tokens (sinks), or None
    blocks: encoded tensors [B, H, N, ...] on the device that computes; `skip` tokens of the first
        block are hidden
    tail: keys [B, H, R, Dk] and values [B, H, R, Dv], the newest, those of this very call included
    empty: columns after the tail that are reserved only (static layouts); nothing attends to them
    new: of the tail, the tokens of this very call
    visible: [B, H, T - new] bool, which columns before these a query may see, where transformers'
        mask does not say it; None where it does
    starts: [B], where `head` has the first tokens of rows that begin at these columns: read as a
        dense tensor, they stand there, and transformers' mask holds. None: `head` is columns 0 to F
    """

    codec: Codec
    head: tuple[Tensor, Tensor] | None
    blocks: Encoded
    skip: int
    tail: tuple[Tensor, Tensor]
    empty: int = 0
    new: int = 0
    visible: Tensor | None = None
    starts: Tensor | None = None

    @property
    def block_count(self) -> int:
        """N."""
        for x in self.blocks.values():
            return x.shape[2]
        return 0

    @cached_property
    def length(self) -> int:
        """T, the number of columns."""
        head = self.head[0].shape[2] if self.head else 0
        return (
            head
            + self.block_count * self.codec.block
            - self.skip
            + self.tail[0].shape[2]
            + self.empty
        )

    @property
    def is_plain(self) -> bool:
        """Whether the tail is all there is: a dense tensor already."""
        return not self.head and not self.blocks and not self.empty

    @property
    def own_mask(self) -> bool:
        """Whether it is for a kernel alone: as one tensor, transformers' mask would not fit it."""
        return self.visible is not None and self.starts is None

    def pieces(self, blocks_at_once: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys [B, H, t, Dk] and values [B, H, t, Dv] piece by piece, in column order."""
        if self.head:
            yield self.head
        skip = self.skip
        for i in range(0, self.block_count, blocks_at_once):
            keys, values = self.codec.decode(
                {name: x[:, :, i : i + blocks_at_once] for name, x in self.blocks.items()}
            )
            yield keys.flatten(2, 3)[:, :, skip:], values.flatten(2, 3)[:, :, skip:]
            skip = 0
        if self.tail[0].shape[2]:
            yield self.tail

    def side(self, side: int) -> Tensor:
        """Keys (0) or values (1) alone, [B, H, T, D], decoded, in the model's dtype."""
        tail = self.tail[side]
        if self.is_plain:
            return tail
        pieces = [self.head[side]] if self.head else []
        if self.block_count:
            decoded = self.codec.decode_side(self.blocks, side).flatten(2, 3)
            pieces.append(decoded[:, :, self.skip :].to(tail.dtype))
        empty = tail.new_zeros(*tail.shape[:2], self.empty, tail.shape[-1])
        dense = torch.cat([*pieces, tail, empty], dim=2)
        return dense if self.starts is None else placed(self.head[side], dense, 0, self.starts)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Both sides."""
        return self.side(0), self.side(1)


def placed(first: Tensor, x: Tensor, column: int, starts: Tensor) -> Tensor:
    """The columns `column` and on, x [B, H, n, D], with the first tokens of rows in their places.

    first: [B, H, F, D]; starts: [B], the column of the first of them.
    """
    F = first.shape[2]
    i = torch.arange(column, column + x.shape[2], device=x.device) - starts[:, None]  # [B, n]
    here = ((i >= 0) & (i < F))[:, None, :, None]
    i = i.clamp(0, F - 1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1])
    return torch.where(here, first.gather(2, i), x)
