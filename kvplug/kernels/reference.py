"""`reference`: plain torch in float32, block by block; all other kernels are tested against it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..attention.mask import causal
from .base import Kernel

if TYPE_CHECKING:
    from torch import Tensor

    from ..attention.stored import Stored

BLOCKS_AT_ONCE = 16  # where decoding is a mere view


@dataclass(frozen=True)
class Reference(Kernel):
    """Plain torch: online softmax (arXiv:1805.02867) over one decoded block at a time.

    In float32, for models of float64 in that.
    """

    name: ClassVar[str] = "reference"
    differentiable: ClassVar[bool] = True

    def attend(
        self,
        query: Tensor,
        stored: Stored,
        mask: Tensor | None,
        scale: float | None,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor]:
        B, Q, S, D = query.shape
        H, T = stored.tail[0].shape[1], stored.length
        G = Q // H  # queries that share a stored head: heads are grouped, never repeated
        wide = torch.promote_types(query.dtype, torch.float32)
        q = (query.to(wide) * (D**-0.5 if scale is None else scale)).reshape(B, H, G * S, D)
        if is_causal:
            mask = causal(S, T, query.device)
        if mask is not None:
            mask = mask.expand(*mask.shape[:-1], T)
        highest = q.new_full((B, H, G * S, 1), -torch.inf)  # running maximum of the scores
        total = q.new_zeros(B, H, G * S, 1)  # running sum of exp(score - highest)
        out = q.new_zeros(B, H, G * S, stored.tail[1].shape[-1])
        column = 0
        for keys, values in stored.pieces(BLOCKS_AT_ONCE if stored.codec.decodes_in_place else 1):
            t = keys.shape[2]
            scores = q @ keys.to(wide).transpose(-1, -2)  # [B, H, G * S, t]
            if mask is not None:
                scores = _masked(scores.view(B, Q, S, t), mask[..., column : column + t]).view(
                    B, H, G * S, t
                )
            column += t
            new = torch.maximum(highest, scores.amax(-1, keepdim=True))
            base = new.masked_fill(
                new == -torch.inf, 0.0
            )  # nothing visible yet: exp(-inf - 0) = 0, not NaN
            weights = (scores - base).exp()
            keep = (highest - base).exp()
            total = total * keep + weights.sum(-1, keepdim=True)
            out = out * keep + weights @ values.to(wide)
            highest = new
        out = torch.where(total == 0, 0.0, out / total).view(B, Q, S, -1)  # NaN stays
        return out.to(query.dtype), (highest + total.log()).view(B, Q, S).float()


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask.to(scores.dtype)
