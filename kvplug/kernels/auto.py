"""`auto`: the fastest kernel that runs here."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

import torch

from .. import registry
from ..errors import MissingExtra
from .base import Kernel
from .reference import Reference

if TYPE_CHECKING:
    from ..codecs.base import Codec

logger = logging.getLogger("kvplug")

COMPILED = {"cpu": "numba", "cuda": "triton"}  # device type -> kernel written for it


@dataclass(frozen=True)
class Auto(Kernel):
    """The compiled kernel of the device where it reads the codec, else `reference`."""

    name: ClassVar[str] = "auto"

    @torch.compiler.disable  # which would trace through the memory of `cache`, and warn of it
    def resolve(self, codec: Codec, device: torch.device, dtype: torch.dtype) -> Kernel:
        return _choose(codec, device, dtype)


@cache
def _choose(codec: Codec, device: torch.device, dtype: torch.dtype) -> Kernel:
    """What runs; where that is the slow one, say why, once."""
    name = COMPILED.get(device.type)
    if name is None:
        return Reference()
    try:
        kernel = registry.find(name)()
        reason = kernel.refuses(codec, device, dtype)
    except MissingExtra as e:
        reason = f"is not there: {e}"
    if reason is None:
        return kernel
    logger.warning(
        "kvplug: plain torch reads %r, several times slower: kernel %r %s", codec.name, name, reason
    )
    return Reference()
