"""The mask of one layer, made of the one that transformers builds for all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from torch import Tensor

    from .stored import Stored


def causal(S: int, T: int, device: torch.device) -> Tensor:
    """What `is_causal` means in torch: query i sees columns 0 to i, bool [S, T]."""
    return torch.ones(S, T, dtype=torch.bool, device=device).tril()


def fit(mask: Tensor | None, is_causal: bool, stored: Stored, heads: int) -> Tensor | None:
    """A mask for the T columns of `stored`, where that needs another than transformers'.

    That one has the columns of the layer that was asked for its sizes. The newest tokens are the
    last columns of both; older ones that it has too many of are cut off, and those it lacks are
    visible. Where a layer says itself which older tokens are visible, head by head, that holds.

    Args:
        mask: bool (True takes part) or additive, [B or 1, heads or 1, S, T'], or None.
        is_causal: upper-left causal, as in torch: S new tokens and none before them.
        stored: what attention reads.
        heads: of the query.

    Returns the mask [B, heads, S, T], or what came where that fits.
    """
    T, new = stored.length, stored.new
    if mask is not None and mask.shape[-1] not in (1, T):
        visible = True if mask.dtype == torch.bool else 0.0
        mask = pad(mask, (T - mask.shape[-1], 0), value=visible)  # a negative number cuts off
    if stored.visible is None or is_causal:
        return mask
    old = stored.visible.repeat_interleave(heads // stored.visible.shape[1], dim=1)[:, :, None]
    if mask is None:
        return pad(old, (0, new), value=True)
    mask = mask[(None,) * (4 - mask.dim())]
    S = mask.shape[2]
    old = old.expand(-1, -1, S, -1)
    if mask.dtype != torch.bool:
        old = torch.zeros_like(old, dtype=mask.dtype).masked_fill(~old, -torch.inf)
    newest = mask.expand(*mask.shape[:3], T)[..., T - new :]
    return torch.cat((old, newest.expand(*old.shape[:3], new)), dim=-1)
