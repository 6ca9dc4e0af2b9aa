"""What attention reads of a layer whose heads hold different numbers of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from torch.nn.functional import pad

if TYPE_CHECKING:
    from torch import Tensor

    from ..codecs.base import Codec
    from .heads import Heads
    from .view import Call


@dataclass(frozen=True)
class Joined:
    """A `Call` for each group of heads: what these hold, who reads it, and who watches.

    As one tensor it has the columns of the longest, and the others stand at its right: the newest
    tokens are the last columns of all.

    heads: which heads a group has
    calls: one for each group
    tail: keys [B, H, S, Dk] and values [B, H, S, Dv] of this very call, all H heads
    """

    heads: Heads
    calls: tuple[Call, ...]
    tail: tuple[Tensor, Tensor]

    @property
    def codec(self) -> Codec:
        """The one of all groups."""
        return self.calls[0].stored.codec

    @cached_property
    def length(self) -> int:
        """T, the number of columns of the longest."""
        return max(call.stored.length for call in self.calls)

    is_plain: ClassVar[bool] = False  # dense, it is always a copy

    @property
    def own_mask(self) -> bool:
        """As of `Stored`."""
        stored = [call.stored for call in self.calls]
        return any(x.own_mask or x.length < self.length for x in stored)

    def side(self, side: int) -> Tensor:
        """Keys (0) or values (1) alone, [B, H, T, D], decoded; zeros before a head's first."""
        sides = [call.stored.side(side) for call in self.calls]
        return self.heads.join([pad(x, (0, 0, self.length - x.shape[2], 0)) for x in sides])

    def dense(self) -> tuple[Tensor, Tensor]:
        """Both sides."""
        return self.side(0), self.side(1)
