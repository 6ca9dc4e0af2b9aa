"""`int` and its presets: keys and values spread over the channels of a head, then integers."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import calibration
from ..errors import SpecError
from ..stage import option
from . import integers, widths
from .base import Codec, Encoded
from .feedback import order_and_weights, turned
from .formats import PLANES, WIDTHS, decode_rotated, levels, unpack
from .guard import swings
from .hadamard import spreader, turn
from .quantize import group_of, half_step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedConfig

JUDGED = 4  # blocks that say whether keys swing
FED = 2.0  # times less KL by keys that are rounded for queries: a calibration rounds plainly
LOST = 2.0**-18  # of a number, by turning it in float32, there and back


def _bits(default: int) -> Any:
    return option(default, "bits per key or value", choices=tuple(sorted((*WIDTHS, *PLANES))))


def _tail(default: int) -> Any:
    return option(default, "newest tokens kept in full precision", ge=0)


@dataclass(frozen=True)
class Rotated(Codec):
    """Integers of 2 to 8 bits, keys and values apart; `int8`, `int4`, `int3`, ... are presets.

    Keys and values are turned by a Hadamard matrix first, which spreads what is large in one
    channel over all of them (QuaRot, arXiv:2404.00456); of 80, 96, 112 or 192 channels by its
    product with a cosine transform of the odd part (`hadamard.py`). A group is one channel over the
    tokens of a block for keys, with a float16 scale and zero (KIVI, arXiv:2402.02750); for values
    `group` neighbouring channels of one token, symmetric, with one byte. The first `first` tokens
    of each row, which all later ones attend to, stay exact, and so do the newest `tail`.

    Keys of fewer than 8 bits are rounded for the queries of the call after which they are encoded
    (`feedback.py`), where there are as many as a head has channels: those of a prompt are, those of
    tokens that come one by one, of `static`, of a draft that may be rolled back, and of attention
    that shows a cache no query are rounded to the nearest code. `stats()` counts both.

    Where the first blocks of a layer (under `static` those of its first call) have keys that swing
    (`guard.py`), all of its keys have 8 bits. That is the most there is, and may still lose more
    than on other models: `stats()` says so, and `strict` refuses such keys.

    Error of what was turned: keys scale / 2, or scale where they are rounded for queries; values
    half a step, one step where a number was cut off. Departures: widths of K and V apart, and
    blocks are never encoded again. The tensors: `formats.py`.
    """

    name: ClassVar[str] = "int"
    block: int = option(64, "tokens per block", choices=(8, 16, 32, 64, 128, 256))
    group: int = option(64, "value channels per scale, lowered to a divisor of head_dim", ge=1)
    tail: int = _tail(32)
    first: int = option(4, "first tokens of each row kept in full precision", ge=0)
    k_bits: int = _bits(4)
    v_bits: int = _bits(4)
    calibration: str | None = option(
        None, "file of `kvplug calibrate`: widths by layer, as many bits in all", passing=True
    )

    strict: bool = option(
        False, "refuse keys that swing, rather than give them 8 bits", passing=True
    )

    @cached_property  # asked in every call of a kernel
    def format(self) -> str:
        return "rotated" if {self.k_bits, self.v_bits} <= set(WIDTHS) else "rotated_planes"

    @property
    def is_concrete(self) -> bool:
        return self.calibration is None

    def resolve(self, config: PreTrainedConfig, layers: Sequence[int]) -> list[Codec]:
        """Itself, or with a calibration `int` of each layer's own widths."""
        if self.is_concrete or not layers:
            return [self] * len(layers)
        told = calibration.read(self.calibration, config, widths.SECTION)
        rows, wanted = list(layers), (self.k_bits, self.v_bits)
        kl = told["kl"][rows] / torch.tensor([FED, 1.0])[:, None]
        found = widths.assign(kl, told["numbers"][rows], wanted)
        # what was not measured stores too little to matter, or nothing
        most = Counter(x for x in found if x).most_common(1)
        rest = most[0][0] if most else wanted
        given = dataclasses.asdict(self) | {"calibration": None}
        return [
            Rotated(**given | {"k_bits": k, "v_bits": v}) for k, v in (x or rest for x in found)
        ]

    def hostile(self, keys: Tensor) -> bool:
        return swings(turn(keys[:, :, :JUDGED]))

    def for_hostile(self) -> Codec:
        """With keys of 8 bits."""
        if self.strict:
            raise SpecError(
                f"{self}: keys of this model swing within a block, as a large bias that positions "
                "turn makes them, and no width is sure to hold that: use 'growing', which is "
                "exact, or leave out strict: they then have 8 bits"
            )
        return self._wide(8)

    def that_made(self, data: Encoded) -> Codec:
        return self._wide(data["k_codes"].shape[-1] * 8 // self.block)

    def _wide(self, k_bits: int) -> Codec:
        if k_bits == self.k_bits:
            return self
        return Rotated(**dataclasses.asdict(self) | {"k_bits": k_bits})

    @property
    def feedback(self) -> bool:
        return self.k_bits < 8  # where there is something to gain

    def encoder(self, device: torch.device) -> str:
        return integers.encoder(device)

    def encode_side(self, x: Tensor, side: int) -> Encoded:
        if side == 0:
            return integers.keys(x, self.k_bits)
        return integers.values(x, self.v_bits, group_of(x.shape[-1], self.group))

    def encode_keys(self, keys: Tensor, moment: Tensor) -> Encoded:
        return integers.keys(keys, self.k_bits, order_and_weights(turned(moment)))

    def decode_side(self, data: Encoded, side: int) -> Tensor:
        return decode_rotated(self, data, side)

    def max_error(self, data: Encoded, side: int) -> Tensor:
        if side == 0:
            k = half_step(data["k_scale"], data["k_zero"], self.k_bits, LOST)
            if self.feedback:  # one of both neighbours
                k = k + data["k_scale"].float() / 2
            return _turned_back(k)[..., None, :]  # [B, H, N, 1, Dk]
        codes = unpack(data["v_codes"].transpose(-1, -2), self.v_bits).transpose(-1, -2)
        step = levels(self.v_bits, codes.device)[data["v_scale"].int()]
        step = step.repeat_interleave(codes.shape[-1] // step.shape[-1], dim=-1)
        at_end = ((codes == 0) | (codes == 2**self.v_bits - 1)) & (self.v_bits in integers.LARGEST)
        return _turned_back(step * torch.where(at_end, 1.0, 0.5) + LOST * step * 2**self.v_bits)


def _turned_back(error: Tensor) -> Tensor:
    """How far U.T x' [..., D] may be off, where x' is off by `error`."""
    return error @ spreader(error.shape[-1], error.device).abs()


@dataclass(frozen=True)
class Preset(Rotated):
    """Bits that are those of the name: they stand in its repr, and no others are taken."""

    def __post_init__(self) -> None:
        super().__post_init__()
        cls = type(self)  # where a dataclass keeps its defaults
        if (self.k_bits, self.v_bits) != (cls.k_bits, cls.v_bits):
            raise SpecError(
                f"{self}: {self.name!r} has {cls.k_bits} bits for keys and {cls.v_bits} for "
                f"values; write {str(Rotated(**dataclasses.asdict(self)))!r}"
            )


@dataclass(frozen=True)
class Int8(Preset):
    """8-bit integers: half of bf16, drift near nothing."""

    name: ClassVar[str] = "int8"
    tail: int = _tail(0)
    k_bits: int = _bits(8)
    v_bits: int = _bits(8)


@dataclass(frozen=True)
class K8V4(Preset):
    """Keys of 8 bits, values of 4: 6.3 bits a number, a third of int4's drift."""

    name: ClassVar[str] = "k8v4"
    k_bits: int = _bits(8)
    v_bits: int = _bits(4)


@dataclass(frozen=True)
class Int4(Preset):
    """4-bit integers: 4.3 bits a number, a bit more than a quarter of bf16, small drift."""

    name: ClassVar[str] = "int4"


@dataclass(frozen=True)
class Int3(Preset):
    """3-bit integers: 3.3 bits a number, a fifth of bf16, five times the drift of int4."""

    name: ClassVar[str] = "int3"
    k_bits: int = _bits(3)
    v_bits: int = _bits(3)


@dataclass(frozen=True)
class Int2(Preset):
    """Keys of 3 bits, values of 2: 2.8 bits a number and heavy drift on small models."""

    name: ClassVar[str] = "int2"
    k_bits: int = _bits(3)
    v_bits: int = _bits(2)
