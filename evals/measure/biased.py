"""A model whose keys have a large constant in one channel, as a bias of its projection gives it.

Rotary positions turn a channel and its partner by a fixed angle per token. Where that is next to
nothing, the constant stays one within a block; where it goes round within a block, the keys swing.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from evals.setup.config import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from transformers import PreTrainedModel


def channel(model: PreTrainedModel, period: float) -> int:
    """Return the channel of a head that goes round in as nearly so many tokens as any does."""
    angles = next((x.inv_freq for x in model.modules() if hasattr(x, "inv_freq")), None)
    if angles is None:
        raise ConfigError("this model has no rotary positions, which turn a constant in its keys")
    periods = 2 * math.pi / angles.float()
    return int((periods.log() - math.log(period)).abs().argmin())


@contextmanager
@torch.no_grad()
def biased(
    model: PreTrainedModel, window: torch.Tensor, at: int, times: float
) -> Iterator[PreTrainedModel]:
    """Add to one channel of all keys `times` the root mean square of the layer's keys of a window
    [N]; take it away again.
    """
    projections = [x for name, x in model.named_modules() if name.endswith(".k_proj")]
    if not projections:
        raise ConfigError("this model has no k_proj whose bias could be raised")
    text = model.config.get_text_config(decoder=True)
    before = [x.bias for x in projections]
    try:
        for layer, size in zip(projections, _sizes(model, projections, window), strict=True):
            added = torch.zeros_like(layer.weight[:, 0]).view(text.num_key_value_heads, -1)
            added[:, at] = times * size
            added = added.flatten() if layer.bias is None else added.flatten() + layer.bias
            layer.bias = torch.nn.Parameter(added, requires_grad=False)
        yield model
    finally:
        for layer, bias in zip(projections, before, strict=True):
            layer.bias = bias


def _sizes(
    model: PreTrainedModel, projections: list[nn.Module], window: torch.Tensor
) -> list[float]:
    """Return the root mean square of what each projection gives for a window [N]."""
    sizes: dict[nn.Module, float] = {}

    def note(layer: nn.Module, given: tuple, keys: torch.Tensor) -> None:
        sizes[layer] = float(keys.float().square().mean().sqrt())

    hooks = [layer.register_forward_hook(note) for layer in projections]
    try:
        model(input_ids=window[None], use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return [sizes[layer] for layer in projections]
