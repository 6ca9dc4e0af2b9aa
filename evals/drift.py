"""How far a cache moves the model's predictions, measured where the cache is read: text fed in
small chunks.

A window of N tokens goes through the model C at a time, so that every chunk attends to what the
cache gives back for the chunks before it. (One forward over the whole window would measure nothing:
attention inside a single update sees that update's own keys and values in full precision.)
Positions before `skip` do not count: there a cache holds little.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import evaluate
import torch

from evals.schema import measured

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

    from evals.config import Config
    from evals.strategies import Strategy

METRIC = Path(__file__).parent / "metrics" / "kv_drift"


@torch.no_grad()
def predictions(
    model: PreTrainedModel, strategy: Strategy, window: torch.Tensor, config: Config
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield, chunk by chunk of window [N], log-probabilities [P, V] in float32 and the tokens [P]
    that came next.

    P counts the chunk's positions from `skip` on that have a next token in the window; V is the
    vocabulary.
    """
    cache = strategy.build(model.config, len(window))
    for start in range(0, len(window), config.chunk):
        stop = min(start + config.chunk, len(window))
        logits = model(
            input_ids=window[None, start:stop], past_key_values=cache, use_cache=True
        ).logits[0]
        first, last = max(start, config.skip), min(stop, len(window) - 1)
        if first < last:
            yield (
                logits[first - start : last - start].float().log_softmax(-1),
                window[first + 1 : last + 1],
            )


def exact_predictions(
    model: PreTrainedModel,
    exact: Strategy,
    windows: torch.Tensor,
    config: Config,
    tick: Callable[[], None],
) -> list[list[torch.Tensor]]:
    """Return the exact cache's log-probabilities, per window and chunk [P, V], kept in host memory.

    They stay float32, (N - skip) * V * 4 bytes per window (0.35 GB for 2,048 tokens of a
    49,152-word vocabulary): a lossless cache must come out at a KL of 0 and an 8-bit one at 1e-4,
    where float16 would already show.
    """
    kept = []
    for window in windows:
        kept.append([logp.cpu() for logp, _ in predictions(model, exact, window, config)])
        tick()
    return kept


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    strategy: Strategy,
    windows: torch.Tensor,
    exact: list[list[torch.Tensor]],
    config: Config,
    tick: Callable[[], None],
) -> dict[str, float]:
    """Return what the kv_drift metric says of windows [W, N] against the exact ones."""
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    for window, kept in zip(windows, exact, strict=True):
        for (logq, target), logp in zip(
            predictions(model, strategy, window, config), kept, strict=True
        ):
            p = logp.to(logq.device)  # [P, V], one chunk at a time
            metric.add_batch(
                nll=-logq.gather(1, target[:, None])[:, 0].double().cpu().numpy(),
                exact_nll=-p.gather(1, target[:, None])[:, 0].double().cpu().numpy(),
                kl=(p.exp() * (p - logq)).sum(-1, dtype=torch.float64).cpu().numpy(),
                agree=(p.argmax(-1) == logq.argmax(-1)).cpu().numpy(),
            )
        tick()
    return metric.compute()


def rows(result: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Yield the measured rows of a kv_drift result."""
    for name in ("perplexity", "perplexity_delta", "kl", "top1"):
        yield measured(name, result[name], note=f"over {result['positions']} positions")
