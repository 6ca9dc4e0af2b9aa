"""Seconds to take in a prompt, milliseconds per token after it, and the memory that both took."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from evals.memory import Peak, held_bytes
from evals.schema import measured

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import Cache, PreTrainedModel

    from evals.config import Config
    from evals.strategies import Strategy

WARMUP_TOKENS = 8


class DishonestBytes(AssertionError):
    """A cache claims other bytes than it holds."""


@torch.no_grad()
def measure(
    model: PreTrainedModel, strategy: Strategy, prompt: torch.Tensor, config: Config
) -> Iterator[dict[str, Any]]:
    """Yield prefill, decode, bytes held and both peaks for prompt [B, T].

    Prefill is one forward, as in `generate`. Decode steps are timed one by one, each waiting for
    the device. Peaks come from the same passes, and are read outside the timed parts.
    """
    limit = prompt.shape[1] + config.warmup + config.decode_steps
    warm = strategy.build(model.config, limit)
    for tokens in (
        prompt[:, :WARMUP_TOKENS],
        prompt[:, :1],
    ):  # compiles kernels, allocates workspaces
        step(model, warm, tokens)
    del warm

    peak = Peak(model.device)
    cache = strategy.build(model.config, limit)
    token, seconds = step(model, cache, prompt)
    peaks = {"peak_prefill": peak.lap()}

    times = []
    for _ in range(config.warmup + config.decode_steps):
        token, elapsed = step(model, cache, token)
        times.append(1000 * elapsed)
    peaks["peak_decode"] = peak.lap()

    stats = cache.stats() if hasattr(cache, "stats") else None  # kvplug's; a rival keeps no account
    yield measured("prefill", seconds, stats=stats)
    yield measured("decode", *times[config.warmup :], stats=stats)
    for name, top in peaks.items():
        yield measured(name, *([] if top is None else [top]), note=peak.how, stats=stats)
    yield measured("bytes_held", checked_bytes(cache), stats=stats)


def step(model: PreTrainedModel, cache: Cache, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Feed tokens [B, S]; return the most likely next one [B, 1] and the seconds it took."""
    _wait(model.device)
    start = time.perf_counter()
    out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    _wait(model.device)
    return token, time.perf_counter() - start


def checked_bytes(cache: Cache) -> int:
    """Return the bytes a walk finds; raise if the cache says otherwise of itself (transformers'
    caches say nothing).
    """
    held = held_bytes(cache)
    if hasattr(cache, "nbytes") and (claimed := cache.nbytes()) != held:
        raise DishonestBytes(
            f"nbytes() claims {claimed:,} bytes, a walk over the cache's tensors finds {held:,}"
        )
    return held


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
