"""`device`: beside the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Place, Placement


class OnDevice(Place):
    """Memory of the device that computes."""

    def empty(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def fetch(self, data: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        return data


@dataclass(frozen=True)
class Device(Placement):
    """Keep everything on the device that computes."""

    name: ClassVar[str] = "device"
    on_device: ClassVar[bool] = True

    def open(self) -> OnDevice:
        return OnDevice()
