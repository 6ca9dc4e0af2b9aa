"""Seconds, the device's own work included."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from kvplug.compat import cache_argument

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import Cache, PreTrainedModel


def timed(device: torch.device, call: Callable[[], Any]) -> float:
    """Return the seconds of one call, until the device is done."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


@torch.no_grad()
def step(
    model: PreTrainedModel, cache: Cache | None, tokens: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Feed tokens [B, S]; return the most likely next one [B, 1] and the seconds it took."""
    wait(model.device)
    start = time.perf_counter()
    out = model(
        input_ids=tokens, **cache_argument(cache), use_cache=cache is not None, logits_to_keep=1
    )
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    wait(model.device)
    return token, time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Return once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
