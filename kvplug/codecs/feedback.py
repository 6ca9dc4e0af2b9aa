"""Rounding with error feedback: what one channel of a key loses, the next ones make up for.

A query q meets a key that is off by e as q . e. Over all queries the square of that is e.T M e,
with their second moment M: so it pays to choose the code of each channel by what the channels
before it have lost. This is GPTQ (Frantar et al., arXiv:2210.17323), in the form of LDLQ (Chee et
al., QuIP, arXiv:2307.13304): M = L L.T with L upper triangular, and e.T M e is the sum over
channels j of (sum over i <= j of L[i, j] e[i])**2, each of which the code of channel j brings near
zero. Grid and bytes stay what they are without it. Departures: M is that of queries, not of inputs
of a weight; a code is one of the two neighbours of its number, so that an error is at most a step,
whatever M is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .hadamard import spreader

if TYPE_CHECKING:
    from torch import Tensor

# of the mean diagonal of M, added to it: directions that no query has looked in count too
DAMPING = 0.02
ENOUGH = 16  # queries per channel


def second_moment(queries: Tensor, heads: int) -> Tensor:
    """M [B, H, D, D] float32 of queries [B, Q, n, D], for each of H stored heads.

    Head h is read by queries h*Q/H and on. Of many queries some are enough, evenly spaced. Queries
    of zero, as of padding, add nothing.
    """
    B, Q, n, D = queries.shape
    queries = queries[:, :, :: max(1, Q // heads * n // (ENOUGH * D))]
    rows = queries.float().reshape(B, heads, -1, D)
    return rows.mT @ rows


def turned(moment: Tensor) -> Tensor:
    """M [..., D, D] of queries that are turned as keys are."""
    U = spreader(moment.shape[-1], moment.device)
    return U @ moment @ U.T


def order_and_weights(moment: Tensor) -> tuple[Tensor, Tensor]:
    """In which order the channels of M [..., D, D] are rounded, and what errors count for later.

    Returns:
        order [..., D] int64, by falling diagonal.
        weights [..., D, D] float32: the j-th channel makes up for weights[j, i] times the error of
            the i-th, i < j, both in that order. Zeros where M is not finite.
    """
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    order = diagonal.argsort(dim=-1, descending=True)
    M = moment.gather(-2, order[..., None].expand_as(moment))
    M = M.gather(-1, order[..., None, :].expand_as(moment))
    damping = DAMPING * diagonal.mean(-1) + torch.finfo(torch.float32).tiny
    M.diagonal(dim1=-2, dim2=-1).add_(damping[..., None])
    L, failed = torch.linalg.cholesky_ex(M.flip(-2, -1))  # upper triangular once flipped back
    L = L.flip(-2, -1)
    weights = (L / L.diagonal(dim1=-2, dim2=-1)[..., None, :]).mT
    usable = (failed == 0) & weights.isfinite().all(-1).all(-1)
    return order, torch.where(usable[..., None, None], weights, 0.0).tril(-1)


def round_keys(
    x: Tensor, scale: Tensor, zero: Tensor, bits: int, order: Tensor, weights: Tensor
) -> Tensor:
    """Codes [B, H, N, D, G] uint8 of keys x [B, H, N, D, G] that were turned, G tokens of a block.

    scale and zero [B, H, N, D] are those of `quantize`; order [B, H, D] and weights [B, H, D, D]
    those of queries that are turned as keys are. What is lost is added up channel by channel, in
    that order, each product rounded: compiled code can do the same.
    """
    scale, zero = scale.float(), zero.float()
    codes = torch.empty_like(x, dtype=torch.uint8)
    lost = torch.zeros_like(x)  # in the order of rounding
    for j in range(x.shape[3]):
        channel = order[:, :, None, j, None, None].expand(*x.shape[:3], 1, x.shape[4])
        step, low = (y.gather(3, channel[..., 0]) for y in (scale, zero))
        own = x.gather(3, channel)[..., 0, :]
        inverse = 1 / step.clamp_min(1e-30)
        number = (own - low) * inverse
        code = (number - lost[..., j, :] * inverse).round()
        code = code.clamp(number.floor(), number.ceil()).clamp(0, 2**bits - 1)
        error = (code * step + low - own)[..., None, :]
        lost[..., j + 1 :, :] += weights[:, :, None, j + 1 :, j, None] * error
        codes.scatter_(3, channel, code.to(torch.uint8)[..., None, :])
    return codes
