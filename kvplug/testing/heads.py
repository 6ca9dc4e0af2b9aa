"""A calibration that gives the heads of whatever model budgets of their own, without measuring."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import calibration
from ..compat import cache_layers
from ..estimate import kv_shapes
from ..retention.budgets import SECTION

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedConfig


def calibrated(config: PreTrainedConfig, path: str | os.PathLike) -> None:
    """Write what `heads=` of a method reads: needs of 1 to 5, unlike in a layer.

    Raises SpecError where the config does not say how many heads it has.
    """
    text = config.get_text_config(decoder=True)
    stored = [heads for heads, *_ in kv_shapes(text, cache_layers(text))]
    needs = torch.full((len(stored), max(stored)), torch.nan)
    for i, heads in enumerate(stored):
        needs[i, :heads] = 1.0 + torch.arange(i, i + heads) * 7 % 5
    calibration.write(path, {f"{SECTION}.need": needs}, config, {})
