"""`hqq`: half-quadratic quantization by the package of that name, blocks encoded once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from hqq.core.optimize import optimize_weights_proximal_legacy_step as step

from ..stage import option
from .grouped import Grouped

if TYPE_CHECKING:
    from torch import Tensor

LP_NORM, BETA, ITERATIONS = 0.7, 10.0, 20  # hqq's own


@dataclass(frozen=True)
class Hqq(Grouped):
    """HQQ's integers of 8, 4, 3 or 2 bits, a scale per token.

    The scale is that of a group's range; hqq's solver then moves the zero, step by step, to where
    an error that outliers count little in is least (Badri and Shaji, Half-Quadratic Quantization,
    2023). Error <= scale / 2; a large constant in one key channel (Qwen2) takes the bits of all
    others of its group. Departures from hqq, and from transformers' cache that uses it: the solver
    takes all of its steps, where hqq stops once the error of all groups together grows, so that
    blocks do not depend on each other; a zero moves by half a step at most, so that no number is
    clipped by more; scales and zeros are float16 in every model; a block is encoded once. The
    tensors: `grouped.py`; zero is minus hqq's, times the scale.
    """

    name: ClassVar[str] = "hqq"
    bits: int = option(4, "bits per key or value", choices=(2, 3, 4, 8))

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        most = 2**self.bits - 1
        width = high - low
        # steps per number, and the bounds of both, are hqq's
        inverse = torch.where(width <= 1e-4, 1.0, most / width).clamp(max=2e4)
        zero = first = -low * inverse
        for _ in range(ITERATIONS):
            _, _, zero, _ = step(x, inverse, zero, [0, most], BETA, LP_NORM, 1)
        zero = first + (zero - first).clamp(-0.5, 0.5)
        return 1 / inverse, -zero / inverse
