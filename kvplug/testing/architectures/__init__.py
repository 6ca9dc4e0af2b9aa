"""Tiny random models of every kind of architecture: what the cache meets in transformers.

A model has a few layers, a vocabulary of about 100 and wide weights, so that next-token scores lie
far apart; norms are drawn too, so that nothing is hidden behind weights of 1. Where the installed
transformers has no such architecture, `make` raises `Absent`.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from ..tools import seeded
from .base import Architecture
from .encoders import ENCODERS
from .media import MEDIA
from .text import TEXT

__all__ = ["ARCHITECTURES", "Absent", "Architecture", "make"]

ARCHITECTURES = TEXT | MEDIA | ENCODERS


class Absent(Exception):
    """The installed transformers has no such architecture."""


def make(name: str, seed: int = 0, **overrides: Any) -> Any:
    """The model of that name in `ARCHITECTURES`, on the CPU, ready for `generate`.

    overrides: of its settings.
    """
    architecture = ARCHITECTURES[name]
    kind = getattr(transformers, f"{architecture.config}Config", None)
    if kind is None:
        raise Absent(f"transformers {transformers.__version__} has no {architecture.config}Config")
    config = kind(**(architecture.settings | overrides))
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        auto = getattr(transformers, architecture.auto)
        options = {"attn_implementation": architecture.attention} if architecture.attention else {}
        model = auto.from_config(config, **options).eval()
    finally:
        torch.random.set_rng_state(state)
    for tokens in (model.generation_config, config):  # every run has its full length
        tokens.eos_token_id = None
    model.generation_config.pad_token_id = 0
    # as trained ones do: no answer holds padding, of which `generate` would make a mask with holes
    model.generation_config.suppress_tokens = [0]
    _draw_norms(model)
    if architecture.config == "Qwen2":  # as trained ones have it: a constant that dwarfs the rest
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.data[5] = 100.0
    return model


def _draw_norms(model: torch.nn.Module) -> None:
    """Weights of norms off their start: what commutes with a weight of 1 need not with others."""
    for i, (name, module) in enumerate(model.named_modules()):
        weight = getattr(module, "weight", None)
        if "norm" in name and isinstance(weight, torch.nn.Parameter) and weight.dim() == 1:
            with torch.no_grad():
                weight += 0.3 * torch.randn(weight.shape, generator=seeded(i))
