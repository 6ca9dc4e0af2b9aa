"""The contract of a codec: how a block of tokens is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..stage import Stage

if TYPE_CHECKING:
    from torch import Tensor

# every tensor [B, H, N, ...]: N blocks on axis 2, so that blocks can be sliced and appended
Encoded = dict[str, "Tensor"]


@dataclass(frozen=True)
class Codec(Stage):
    """Turns whole blocks of `block` tokens into fewer bytes and back.

    A block is encoded once and its bytes never change. The newest `tail` tokens, and those that do
    not fill a block yet, stay in full precision: at most `tail + block - 1` of them after each
    call.

    `encode` and `decode` are pure functions of their arguments, in plain torch (they are compiled
    with the model under `static`), must take any number of blocks, 0 included, and each block must
    encode as it would alone.
    """

    kind: ClassVar[str] = "codec"
    lossless: ClassVar[bool] = False
    # decoding is a mere view of the encoded tensors: many blocks can be read at once for free
    decodes_in_place: ClassVar[bool] = False

    block: int
    tail: int

    def encode(self, keys: Tensor, values: Tensor) -> Encoded:
        """Encode keys [B, H, N, block, Dk] and values [B, H, N, block, Dv] of any float dtype.

        Returns named tensors [B, H, N, ...].
        """
        raise NotImplementedError

    def decode(self, data: Encoded) -> tuple[Tensor, Tensor]:
        """Decode named tensors [B, H, N, ...].

        Returns keys [B, H, N, block, Dk] and values [B, H, N, block, Dv], float32 or as they came.
        """
        raise NotImplementedError

    def decode_side(self, data: Encoded, side: int) -> Tensor:
        """Keys (0) or values (1) as `decode` gives them; write it where one side costs less."""
        return self.decode(data)[side]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "decode" in vars(cls) and "decode_side" not in vars(cls):
            cls.decode_side = Codec.decode_side  # not that of a parent, which has other bytes

    def max_error(self, data: Encoded) -> tuple[Tensor, Tensor]:
        """The codec's own bound on |decoded - original|, broadcastable to keys and to values."""
        raise NotImplementedError
