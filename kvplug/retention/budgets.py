"""Budgets of single heads, in proportion to what a calibration file says that they need."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import calibration

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

    from .base import Scored

SECTION = "budgets"


def of_heads(retention: Scored, config: PreTrainedConfig) -> list[tuple[int, ...] | None]:
    """Tokens that each stored head of each layer keeps; None of a layer that was not measured.

    Raises SpecError where the file is none, or of another model.
    """
    needs = calibration.read(retention.heads, config, SECTION)["need"]  # [L, H]
    return split(needs, retention.budget, retention.least)


def split(needs: Tensor, budget: int, least: int) -> list[tuple[int, ...] | None]:
    """Budgets in proportion to needs [L, H] > 0, NaN for no head: `budget` on average, none below
    `least`, None of a layer without any.
    """
    needs = needs.double()
    real = ~needs.isnan()
    rising = needs[real].sort().values
    # the fewest heads are at `least` that leave all others more, in proportion
    for few in range(len(rising)):
        rest = rising[few:]
        scale = (budget * len(rising) - least * few) / rest.sum()
        if scale * rest[0] >= least:
            break
    budgets = (needs * scale).clamp_min(least).round()
    return [
        tuple(map(int, row[is_head].tolist())) or None
        for row, is_head in zip(budgets, real, strict=True)
    ]
