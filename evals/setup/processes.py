"""The processes of one run: one, or as many as `accelerate launch` starts."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

PATIENCE = timedelta(days=7)  # how long one waits for the others


def state() -> PartialState:
    """Return this process's place among the others; the same object at every call."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def agree(keys: list[str]) -> set[str]:
    """Return what the main process gave."""
    told = [keys]
    broadcast_object_list(told)
    return set(told[0])
