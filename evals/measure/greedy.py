"""What a cache makes the model say, through `generate`, as a user calls it; and how long greedy
decoding says the same as with the exact cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from evals.rows.schema import measured

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from evals.setup.contenders import Contender


def continuation(
    model: PreTrainedModel, contender: Contender, prompt: torch.Tensor, count: int, **how: Any
) -> torch.Tensor:
    """Generate exactly `count` tokens [B, count] after prompt [B, T]: greedily, unless `how` says
    otherwise in the words of `generate`; torch's seed then decides.
    """
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        **{"do_sample": False} | how,
        max_new_tokens=count,
        min_new_tokens=count,  # an early end of text would cut the comparison short
        pad_token_id=0,  # never used; without it generate warns
        **contender.generate_arguments(model.config, prompt.shape[1] + count),
    )
    return out[:, prompt.shape[1] :]


def agreement(ours: torch.Tensor, exact: torch.Tensor) -> dict[str, Any]:
    """Return the row for the number of leading tokens [B, N] that are equal."""
    return measured("greedy", *(ours == exact).long().cumprod(1).sum(1).tolist())
