"""Seconds to take in a prompt, and the most memory that this and the tokens after it take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evals.clock import step
from evals.memory import Peak
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
    """Yield prefill, one forward as in `generate`, and both peaks for prompt [B, T]."""
    limit = prompt.shape[1] + config.warmup + config.decode_steps
    warm_up(model, strategy, prompt)
    peak = Peak(model.device)
    cache = strategy.build(model.config, limit)
    token, seconds = step(model, cache, prompt)
    peaks = {"peak_prefill": peak.lap()}
    for _ in range(config.warmup + config.decode_steps):
        token, _ = step(model, cache, token)
    peaks["peak_decode"] = peak.lap()
    yield measured("prefill", seconds)
    for name, top in peaks.items():
        yield measured(name, *([] if top is None else [top]), note=peak.how)
