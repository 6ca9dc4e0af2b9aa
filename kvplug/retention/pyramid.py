"""`pyramid`: as `snapkv`, with more for lower layers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from ..errors import SpecError
from ..stage import option
from .snapkv import SnapKV


@dataclass(frozen=True)
class Pyramid(SnapKV):
    """Keep as `snapkv` does, more in lower layers and less in higher (PyramidKV, arXiv:2406.02069).

    Beside the window, which each layer keeps, the last layer has 1 / `beta` of the mean, the first
    as much above it, and those between lie on a line; `budget` is the mean over layers. Departures:
    those of `snapkv`.
    """

    name: ClassVar[str] = "pyramid"
    beta: int = option(20, "how many times less than the mean the last layer keeps", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads is not None:
            raise SpecError(f"{self}: layers have budgets already; take 'snapkv' with heads=")

    def at(self, layer_idx: int, layers: int) -> Pyramid:
        least = 1 / self.beta
        share = 1 if layers == 1 else 2 - least - 2 * (1 - least) * layer_idx / (layers - 1)
        chosen = max(1, round((self.budget - self.window) * share))
        return dataclasses.replace(self, budget=self.window + chosen)
