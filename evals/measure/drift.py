"""How far a cache moves the model's predictions, measured where the cache is read: text fed in
small chunks.

A window of N tokens goes through the model C at a time, so that every chunk attends to what the
cache gives back for the chunks before it. (One forward over the whole window would measure nothing:
attention inside a single update sees that update's own keys and values in full precision.)
Positions before `skip` do not count: there a cache holds little.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from evals import metrics
from evals.rows.schema import measured
from kvplug.compat import cache_argument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import Cache, PreTrainedModel

    from evals.setup.config import Config
    from evals.setup.contenders import Contender


@torch.no_grad()
def predictions(
    model: PreTrainedModel,
    contender: Contender,
    window: torch.Tensor,
    config: Config,
    look: Callable[[Cache], None] = lambda cache: None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield, chunk by chunk of window [N], log-probabilities [P, V] in float32 and the tokens [P]
    that came next.

    P counts the chunk's positions from `skip` on that have a next token in the window; V is the
    vocabulary. `look` is shown the cache that has taken in all of it.
    """
    cache = contender.build(model.config, len(window))
    for start in range(0, len(window), config.chunk):
        stop = min(start + config.chunk, len(window))
        logits = model(
            input_ids=window[None, start:stop], **cache_argument(cache), use_cache=True
        ).logits[0]
        first, last = max(start, config.skip), min(stop, len(window) - 1)
        if first < last:
            yield (
                logits[first - start : last - start].float().log_softmax(-1),
                window[first + 1 : last + 1],
            )
    look(cache)


def exact_predictions(
    model: PreTrainedModel,
    exact: Contender,
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
    contender: Contender,
    windows: torch.Tensor,
    exact: list[list[torch.Tensor]],
    config: Config,
    tick: Callable[[], None],
    look: Callable[[Cache], None] = lambda cache: None,
) -> dict[str, np.ndarray]:
    """Return what happened at every position of windows [W, N] that counts: arrays [W, P].

    They are the inputs of the kv_drift metric. `look` is shown the cache at the end of each window.
    """
    whole = []
    for window, kept in zip(windows, exact, strict=True):
        chunks = []
        for (logq, target), logp in zip(
            predictions(model, contender, window, config, look), kept, strict=True
        ):
            p = logp.to(logq.device)  # [P, V], one chunk at a time
            chunks.append(
                {
                    "nll": -logq.gather(1, target[:, None])[:, 0].double(),
                    "exact_nll": -p.gather(1, target[:, None])[:, 0].double(),
                    "kl": (p.exp() * (p - logq)).sum(-1, dtype=torch.float64),
                    "agree": p.argmax(-1) == logq.argmax(-1),
                }
            )
        whole.append({name: torch.cat([c[name] for c in chunks]).cpu() for name in chunks[0]})
        tick()
    return {name: torch.stack([w[name] for w in whole]).numpy() for name in whole[0]}


def overall(positions: dict[str, np.ndarray]) -> dict[str, float]:
    """Return what the kv_drift metric says of positions."""
    return metrics.load("kv_drift").compute(**{name: x.ravel() for name, x in positions.items()})


def rows(
    positions: dict[str, np.ndarray], first: int | None = None, last: int | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the measured rows of positions first:last, counted from `skip`; spread over windows."""
    part = {name: x[:, first:last] for name, x in positions.items()}
    whole = overall(part)
    each = [overall({name: x[i] for name, x in part.items()}) for i in range(len(part["kl"]))]
    note = f"over {whole['positions']} positions; spread over {len(each)} windows"
    for name in ("perplexity", "perplexity_delta", "kl", "top1"):
        yield measured(name, *(one[name] for one in each), value=whole[name], note=note)


def buckets(config: Config) -> Iterator[tuple[str, int, int]]:
    """Yield ranges of positions up to each power of two: a label, first and last from `skip`."""
    start = config.skip
    while start < config.window - 1:
        stop = min(1 << max(start, 1).bit_length(), config.window)
        yield f"{start}-{stop}", start - config.skip, min(stop, config.window - 1) - config.skip
        start = stop


def exact_perplexity(
    exact: list[list[torch.Tensor]], windows: torch.Tensor, config: Config
) -> float:
    """Return the perplexity that the exact cache's log-probabilities give."""
    nll = []
    for window, kept in zip(windows.cpu(), exact, strict=True):
        targets = window[config.skip + 1 :, None].split([len(logp) for logp in kept])
        nll += [-p.gather(1, t).double() for p, t in zip(kept, targets, strict=True)]
    return float(torch.cat(nll).mean().exp())


@torch.no_grad()
def plain_perplexity(model: PreTrainedModel, windows: torch.Tensor, config: Config) -> float:
    """Return the perplexity of windows [W, N] by the model's own loss, without any cache."""
    losses = []
    for window in windows:
        labels = window[None].clone()
        labels[:, : config.skip + 1] = -100  # position `skip` predicts token skip + 1
        losses.append(
            model(input_ids=window[None], labels=labels, use_cache=False).loss.double().item()
        )
    return float(np.exp(np.mean(losses)))
