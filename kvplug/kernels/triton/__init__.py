"""`triton`: split-K flash decoding on CUDA; encoded keys and values are unpacked in registers.

One program reads a share of the columns for all queries of one stored head, or a tile of them:
pinned tokens, encoded blocks, tail, with an online softmax in float32 (arXiv:1805.02867). Where
several programs share the columns of a head, a second, small kernel merges what they found by
log-sum-exp (https://pytorch.org/blog/flash-decoding). Blocks of the format `rotated` meet a query
turned alike, and the second kernel turns back what they gave.

Axes in kernels: M rows, of the G * S queries of a stored head; K channels of a key; GROUPS x WIDTH
channels of a value; t columns of a step. Each is padded to a power of two that tensor cores take. A
tensor comes as a tuple: pointer and strides, the last one of tokens or blocks; what follows that
axis is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import triton

from ...codecs.hadamard import spreader
from ..base import Kernel
from . import attend as kernels
from .decode import INTERPRETED
from .sizes import share_of, sizes_of

if TYPE_CHECKING:
    from torch import Tensor

    from ...attention.stored import Stored
    from ...codecs.base import Codec

DEVICES = ("cuda", "meta", "cpu") if INTERPRETED.value else ("cuda", "meta")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ENCODED = ("k_codes", "k_scale", "k_zero", "v_codes", "v_scale", "v_zero")


@dataclass(frozen=True)
class Triton(Kernel):
    """CUDA: a block is unpacked in registers, once for all queries of its head."""

    name: ClassVar[str] = "triton"
    formats: ClassVar[tuple[str, ...]] = ("plain", "affine", "rotated", "rotated_planes")

    def attend(
        self,
        query: Tensor,
        stored: Stored,
        mask: Tensor | None,
        scale: float | None,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor]:
        B, Q, S, Dk = query.shape
        _, H, R, Dv = stored.tail[1].shape
        head, middle, tail = _tokens(stored.head), _middle(stored), _tokens(stored.tail)
        F, N = (0 if piece is None else piece[0][0].shape[2] for piece in (head, middle))
        groups = stored.blocks["v_scale"].shape[4] if "v_scale" in stored.blocks else 0
        rows = Q // H * S
        Z = sizes_of(min(rows, 64), Dk, Dv, query.element_size(), is_causal, stored.codec, groups)

        grid = triton.cdiv(rows, Z.ROWS), B * H
        steps = sum(triton.cdiv(n, Z.TILE) for n in (F, R)) + triton.cdiv(N * Z.BLOCK, Z.STEP)
        share = share_of(steps, grid[0] * grid[1], query.device)
        splits = max(1, triton.cdiv(steps, share))
        out = query.new_empty(B, Q, S, Dv)
        lse = query.new_empty(B, Q, S, dtype=torch.float32)
        found, turned, matrix = (out, lse, None), None, None
        parts = splits
        if Z.TURNED:  # a share of blocks and one of plain tokens are two parts
            parts, matrix = 2 * splits, spreader(Dv, query.device)
            turned = _strided(query.float() @ spreader(Dk, query.device).T)
        if parts > 1:
            found = [lse.new_empty(parts, B * Q * S * n) for n in (Dv, 1, 1)]
        if mask is not None:
            mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
            mask = _strided(mask.expand(B, Q, S, stored.length), axes=4)
        skip = stored.skip if groups else 0  # `_middle` has left out the others
        scale = float(Dk**-0.5 if scale is None else scale)
        with torch.cuda.device_of(query):  # Triton launches on the current device
            kernels.attend[(*grid, splits)](
                *(_strided(_rows(query)), turned, mask, head, middle, tail, *found),
                *(F, N, R, skip, H, Q // H, S, share, scale, Z),
                num_warps=Z.warps,
                num_stages=Z.stages,
                enable_fp_fusion=True,  # said aloud: Triton 3.10 does without by default
            )
            if parts > 1:
                padded = triton.next_power_of_2(Dv), triton.next_power_of_2(parts)
                kernels.merge[(B * Q * S,)](
                    *(*found, out, lse, matrix, parts, Dv, *padded),
                    num_warps=8 if parts * Dv > 8192 else 4,
                    enable_fp_fusion=True,
                )
        return out, lse

    def refuses(
        self,
        codec: Codec,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> str | None:
        if reason := super().refuses(codec):
            return reason
        if device is not None and device.type not in DEVICES:
            return f"needs a CUDA device, not {device.type!r} (TRITON_INTERPRET=1 interprets it)"
        if dtype is not None and dtype not in DTYPES:
            return f"reads float32, float16 and bfloat16, not {dtype}"
        return None


# --- arguments, from shapes and strides alone: nothing waits for the device


def _strided(x: Tensor, axes: int = 3) -> tuple:
    """A tensor and the strides of its first axes."""
    return (x, *x.stride()[:axes])


def _rows(x: Tensor) -> Tensor:
    """A few tokens [B, H, n, D], whose channels must be contiguous, as they nearly always are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _tokens(pair: tuple[Tensor, Tensor] | None) -> tuple | None:
    """Keys and values as they came."""
    return None if pair is None else tuple(_strided(_rows(x)) for x in pair)


def _middle(stored: Stored) -> tuple | None:
    """Encoded blocks; those of `exact` are tokens as they came, from the first visible one on."""
    if not stored.block_count:
        return None
    if "k" in stored.blocks:
        sides = (stored.blocks[name].flatten(2, 3)[:, :, stored.skip :] for name in "kv")
        return tuple(_strided(x) for x in sides)
    scale = stored.blocks["v_scale"]  # there are no zeros in `rotated`
    return tuple(_strided(stored.blocks.get(name, scale)) for name in ENCODED)
