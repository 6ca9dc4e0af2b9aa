"""`exact`: the bytes as they came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..stage import option
from .base import Codec, Encoded
from .formats import decode_plain

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Exact(Codec):
    """Keys and values as they came.

    On the device no blocks are cut; on host and disk a block is what is moved.
    The tensors: `formats.py`.
    """

    name: ClassVar[str] = "exact"
    lossless: ClassVar[bool] = True
    decodes_in_place: ClassVar[bool] = True
    cuts_blocks: ClassVar[bool] = False
    format: ClassVar[str] = "plain"
    block: int = option(64, "tokens moved at once", ge=1)
    tail: int = option(0, "newest tokens kept on the device", ge=0)

    def encode_side(self, x: Tensor, side: int) -> Encoded:
        return {"kv"[side]: x}

    def decode_side(self, data: Encoded, side: int) -> Tensor:
        return decode_plain(self, data, side)

    def max_error(self, data: Encoded, side: int) -> Tensor:
        return data["kv"[side]].new_zeros(())
