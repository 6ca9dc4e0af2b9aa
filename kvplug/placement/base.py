"""The contract of a placement: where encoded blocks are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..stage import Stage

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Place:
    """One cache's hold on a placement: makes room, and brings blocks to where they are read.

    A `Place` may own something (a directory, a CUDA stream); it is made when a cache is built and
    goes with it.
    """

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised room of `shape` for a cache that computes on `device`."""
        raise NotImplementedError

    def fetch(self, data: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """The same tensors where `device` can read them; a copy only where it cannot."""
        return {name: x.to(device) for name, x in data.items()}

    def prefetch(self, data: dict[str, Tensor], device: torch.device) -> dict[str, Tensor] | None:
        """Start fetching ahead of time where that is possible without waiting, else None."""
        return None


@dataclass(frozen=True)
class Placement(Stage):
    """Where encoded blocks are kept. The full-precision tail stays on the device."""

    kind: ClassVar[str] = "placement"
    on_device: ClassVar[bool] = False  # beside the model: nothing is fetched

    def open(self) -> Place:
        """A `Place` for one cache."""
        raise NotImplementedError
