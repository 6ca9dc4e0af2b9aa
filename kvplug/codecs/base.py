"""The contract of a codec: how a block of tokens is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from ..stage import Stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor
    from transformers import PreTrainedConfig

# every tensor [B, H, N, ...]: N blocks on axis 2, so that blocks can be sliced and appended
Encoded = dict[str, "Tensor"]


@dataclass(frozen=True)
class Codec(Stage):
    """Turns whole blocks of `block` tokens into fewer bytes and back.

    A block is encoded once and its bytes never change. The newest `tail` tokens, and those that do
    not fill a block yet, stay in full precision: at most `tail + block - 1` of them after each
    call. So do the first `first` tokens of each row, to which all later ones attend.

    A codec writes the three methods that take a `side`: 0 for keys, 1 for values. `encode_side` and
    `decode_side` are pure functions of their arguments, in plain torch (they are compiled with the
    model under `static`), must take any number of blocks, 0 included, and each block must encode as
    it would alone.
    """

    kind: ClassVar[str] = "codec"
    lossless: ClassVar[bool] = False
    # decoding is a mere view of the encoded tensors: many blocks can be read at once for free
    decodes_in_place: ClassVar[bool] = False
    # whether blocks are cut on the device too; where not, all stays as it came
    cuts_blocks: ClassVar[bool] = True
    # what the encoded tensors are, told to kernels: a key of `formats.FORMATS`; None: only `decode`
    # knows. A subclass that decodes by itself says it anew, or has none.
    format: ClassVar[str | None] = None

    block: int
    tail: int
    first = 0  # a codec that has the option says so
    feedback = False  # whether it rounds keys for queries, where it is shown any: `encode_keys`

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if both := sorted({"encode", "decode"} & set(vars(cls))):
            raise TypeError(
                f"{cls.__name__}: a codec writes encode_side and decode_side, for keys (0) and for "
                f"values (1), and leaves {' and '.join(both)} to kvplug.Codec"
            )
        if "decode_side" in vars(cls) and "format" not in vars(cls):
            cls.format = None  # not that of a parent, which has other bytes

    def encoder(self, device: torch.device) -> str:
        """What encodes tensors of a device: `torch`, or the name of a kernel."""
        return "torch"

    def encode_side(self, x: Tensor, side: int) -> Encoded:
        """Encode keys or values [B, H, N, block, D] of any float dtype.

        Returns tensors [B, H, N, ...], under names that the other side does not use.
        """
        raise NotImplementedError

    def decode_side(self, data: Encoded, side: int) -> Tensor:
        """Decode keys or values [B, H, N, block, D]: float32, or as they came.

        data: tensors [B, H, N, ...] of that side; those of the other may lie beside them.
        """
        raise NotImplementedError

    def max_error(self, data: Encoded, side: int) -> Tensor:
        """The codec's own bound on |decoded - original|, broadcastable to [B, H, N, block, D]."""
        raise NotImplementedError

    @property
    def is_concrete(self) -> bool:
        """Whether every layer of every model gets the codec as it is."""
        return type(self).resolve is Codec.resolve

    def resolve(self, config: PreTrainedConfig, layers: Sequence[int]) -> list[Codec]:
        """What serves each of these layers of a model of this config, all of them concrete.

        Raises SpecError where the codec lacks something, or cannot serve such a model.
        """
        return [self] * len(layers)

    def hostile(self, keys: Tensor) -> bool:
        """Whether a layer whose first blocks hold such keys [B, H, N, block, Dk] would lose more
        than others by this codec.
        """
        return False

    def for_hostile(self) -> Codec:
        """What serves such a layer: itself, or one that differs in its widths alone.

        Raises SpecError where such keys are refused.
        """
        return self

    def that_made(self, data: Encoded) -> Codec:
        """This one or `for_hostile`, whichever has encoded these blocks."""
        return self

    def encode_keys(self, keys: Tensor, moment: Tensor) -> Encoded:
        """`encode_side` of keys for queries of this second moment, of a codec with `feedback`.

        moment: [B, H, Dk, Dk] float32, the mean of q q.T or any multiple of it.
        """
        raise NotImplementedError

    @final
    def encode(self, keys: Tensor, values: Tensor, moment: Tensor | None = None) -> Encoded:
        """Both sides: keys [B, H, N, block, Dk] and values [B, H, N, block, Dv].

        moment: of queries, as `encode_keys` wants it; None: none were seen.
        """
        # keys of no data (meta) take the same room either way, and rounding them takes a second
        plain = moment is None or keys.is_meta
        coded = self.encode_side(keys, 0) if plain else self.encode_keys(keys, moment)
        return coded | self.encode_side(values, 1)

    @final
    def decode(self, data: Encoded) -> tuple[Tensor, Tensor]:
        """Both sides: keys [B, H, N, block, Dk] and values [B, H, N, block, Dv]."""
        return self.decode_side(data, 0), self.decode_side(data, 1)
