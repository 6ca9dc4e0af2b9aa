"""Seconds to take in a prompt, and the most memory that this and the tokens after it take."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from evals.measure.clock import step
from evals.rows.schema import measured

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel

    from evals.measure.peaks import Peak
    from evals.setup.contenders import Contender

WARMUP_TOKENS = 400  # several blocks of any codec: kernels that read blocks must have run


def warm_up(model: PreTrainedModel, contender: Contender, prompt: torch.Tensor) -> None:
    """Have a cache of its own take in a part of prompt [B, T], and decode: compiles kernels."""
    cache = contender.build(model.config, prompt.shape[1] + 1)
    for tokens in (prompt[:, :WARMUP_TOKENS], prompt[:, :1]):
        step(model, cache, tokens)


def prefill_and_peaks(
    model: PreTrainedModel,
    contender: Contender,
    prompt: torch.Tensor,
    steps: int,
    peaks: dict[str, Peak],
) -> tuple[float, list[dict[str, Any]]]:
    """Have a new cache take in prompt [B, T] in one forward, and decode `steps` tokens.

    Return the seconds of the first, and rows that say what each of `peaks` saw in both.
    """
    rows = []

    @contextmanager
    def watched(phase: str) -> Iterator[None]:
        for peak in peaks.values():
            peak.start()
        try:
            yield
        finally:
            tops = {name: peak.stop() for name, peak in peaks.items()}
        for name, top in tops.items():
            samples = [] if top is None else [top]
            rows.append(measured(f"{name}_{phase}", *samples, note=peaks[name].how))

    with watched("prefill"):
        cache = contender.build(model.config, prompt.shape[1] + steps)
        token, seconds = step(model, cache, prompt)
    with watched("decode"):
        for _ in range(steps):
            token, _ = step(model, cache, token)
    return seconds, rows
