"""`host`: in the memory of the CPU."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

import torch

from .base import Place, Placement

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("kvplug")


@cache
def _warn() -> None:
    """Once in a process: a server may build a cache per request."""
    logger.warning("cache placement 'host' saves nothing here: the model itself runs on the CPU")


class OnHost(Place):
    """Host memory, pinned for CUDA; a layer's blocks travel while the one before computes."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    @torch.compiler.disable  # what allocates and warns once is not traced
    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type == "cpu":
            _warn()
        if device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")

    def fetch(self, data: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        if self._stream is not None:
            torch.cuda.current_stream(device).wait_stream(self._stream)
            for x in data.values():
                if x.is_cuda:  # from prefetch: not to be reused before this stream has read it
                    x.record_stream(torch.cuda.current_stream(device))
        return {name: x.to(device, non_blocking=True) for name, x in data.items()}

    def prefetch(self, data: dict[str, Tensor], device: torch.device) -> dict[str, Tensor] | None:
        if device.type != "cuda":
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        # blocks may just have been written from there
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            return {name: x.to(device, non_blocking=True) for name, x in data.items()}

    def __deepcopy__(self, memo: dict) -> OnHost:
        return OnHost()


@dataclass(frozen=True)
class Host(Placement):
    """Keep blocks in host memory, pinned on CUDA and fetched one layer ahead."""

    name: ClassVar[str] = "host"

    def open(self) -> OnHost:
        return OnHost()
