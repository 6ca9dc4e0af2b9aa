"""Seconds to take in a prompt, milliseconds per token after it, and the memory that both took."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evals.clock import step
from evals.memory import Peak, checked_bytes
from evals.schema import measured

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel

    from evals.config import Config
    from evals.strategies import Strategy

WARMUP_TOKENS = 400  # several blocks of any codec: kernels that read blocks must have run


def warm_up(model: PreTrainedModel, strategy: Strategy, prompt: torch.Tensor) -> None:
    """Have a cache of its own take in a part of prompt [B, T], and decode: compiles kernels."""
    cache = strategy.build(model.config, prompt.shape[1] + 1)
    for tokens in (prompt[:, :WARMUP_TOKENS], prompt[:, :1]):
        step(model, cache, tokens)


def measure(
    model: PreTrainedModel, strategy: Strategy, prompt: torch.Tensor, config: Config
) -> Iterator[dict[str, Any]]:
    """Yield prefill, decode, bytes held and both peaks for prompt [B, T].

    Prefill is one forward, as in `generate`. Decode steps are timed one by one, each waiting for
    the device. Peaks come from the same passes, and are read outside the timed parts.
    """
    limit = prompt.shape[1] + config.warmup + config.decode_steps
    warm_up(model, strategy, prompt)
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
