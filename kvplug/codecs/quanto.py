"""`quanto`: the quantizer of optimum-quanto, in blocks that are encoded once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from optimum.quanto import MaxOptimizer, qint2, qint4

from ..stage import option
from .grouped import Grouped

if TYPE_CHECKING:
    from torch import Tensor

TYPES = {2: qint2, 4: qint4}


@dataclass(frozen=True)
class Quanto(Grouped):
    """optimum-quanto's integers of 4 or 2 bits, a scale per token.

    Scale and shift are those of `MaxOptimizer`, codes those of quanto's `quantize_affine`: what
    transformers' quantized cache stores. Departures from that cache: a block is encoded once, where
    transformers encodes all history again every 128 tokens; scales are float16 in every model.
    Error <= scale / 2; a large constant in one key channel (Qwen2) takes the bits of all others of
    its group, there as here. The tensors: `grouped.py`; zero is minus quanto's shift.
    """

    name: ClassVar[str] = "quanto"
    bits: int = option(4, "bits per key or value", choices=tuple(sorted(TYPES)))

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = MaxOptimizer().optimize(x, TYPES[self.bits], axis=0)
        return scale, -shift

    def round(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return torch.ops.quanto.quantize_affine(x, self.bits, 0, None, scale, -zero)
