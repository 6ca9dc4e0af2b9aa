"""`numba`: attention on the CPU that reads encoded blocks as they are stored.

Columns are taken in tiles of `TILE`, read by all query rows of their head: keys as [Dk, TILE] so
that scores run along tokens, values as [TILE, Dv]. Codes become floats in registers, between the
load and the products, where a tile is made of whole vectors; other tiles, and codes in two planes,
are decoded once, into scratch that stays in the first-level cache. Blocks whose keys and values
were turned meet a query turned alike; what their values gave is turned back once, after the last of
them, so they come first.

The way of a call: here, `arguments` (tensors become integers), `process` (the compiled kernel and
its threads); compiled: `attend`, `decode`, `products`, and `simd`, whose operations these are made
of, with the sizes of `tiles`. The package `numba` itself is imported as ever: imports are absolute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..base import Kernel
from . import process
from .arguments import (
    CPU,
    NO_CODES,
    NO_TOKENS,
    NUMBERS,
    codes_of,
    mask_of,
    query_of,
    tokens_of,
    tokens_of_blocks,
)
from .simd import LANES
from .tiles import ROWS, TILE, partial_of, scratch_of

if TYPE_CHECKING:
    from torch import Tensor

    from ...attention.stored import Stored
    from ...codecs.base import Codec


@dataclass(frozen=True)
class Numba(Kernel):
    """Compiled for this CPU by Numba on first use and kept on disk (`kvplug warmup`)."""

    name: ClassVar[str] = "numba"
    formats: ClassVar[tuple[str, ...]] = ("plain", "affine", "rotated", "rotated_planes")

    def refuses(
        self,
        codec: Codec,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> str | None:
        if reason := super().refuses(codec):
            return reason
        if device is not None and device.type not in ("cpu", "meta"):
            return f"runs on the CPU, not on {device.type!r}"
        if dtype is not None and dtype not in NUMBERS:
            return f"reads float32, float16 and bfloat16, not {dtype}"
        return None

    def reads_plain(self, S: int, T: int) -> bool:
        return S <= 8 and T >= 1024  # 0.6 of the time at 6,000 tokens; the same at 1,000

    def reads_sinks(self, S: int, T: int) -> bool:
        return S <= 8  # beside torch's own attention there is a copy of all columns to be saved

    def attend(
        self,
        query: Tensor,
        stored: Stored,
        mask: Tensor | None,
        scale: float | None,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor]:
        kernel = process.compiled(process.attend)
        B, Q, S, Dk = query.shape
        H, Dv, T = stored.tail[0].shape[1], stored.tail[1].shape[-1], stored.length
        if is_causal:
            mask = torch.ones(S, T, dtype=torch.bool, device=CPU).tril()
        if mask is not None:
            mask = mask if mask.dtype == torch.bool else mask.float()
            mask = _rows_contiguous(mask.expand(B, Q, S, T))
        query, tail = _rows_contiguous(query), [_rows_contiguous(x) for x in stored.tail]
        head = [_rows_contiguous(x) for x in stored.head or ()]
        plain, codes = NO_TOKENS, NO_CODES
        if count := stored.block_count * stored.codec.block:
            if stored.codec.format == "plain":
                plain = tokens_of_blocks(stored.blocks, count, stored.skip)
            else:
                codes = codes_of(stored.codec, stored.blocks, count, stored.skip)
        out, lse = _floats(B, Q, S, Dv), _floats(B, Q, S)
        row_tiles = -(-(Q // H * S) // ROWS)
        workers = torch.get_num_threads()
        splits = _splits(B * H * row_tiles, -(-T // TILE), workers)
        width = -(-Dv // LANES) * LANES
        results = workers if splits == 1 else B * H * row_tiles * splits
        with process.ONE_AT_A_TIME, process.threads(workers):
            room = _room(workers * scratch_of(Dk, width) + results * partial_of(width))
            kernel(
                (B, H, Q // H, S, Dk, Dv, width),
                (row_tiles, splits, workers),
                query_of(query),
                Dk**-0.5 if scale is None else scale,
                tokens_of(*head) if head else NO_TOKENS,
                plain,
                codes,
                tokens_of(*tail),
                mask_of(mask),
                (room, out.data_ptr(), lse.data_ptr()),
            )
        return out.to(query.dtype), lse

    def warmup(self) -> None:
        for function in process.SIGNATURES:
            process.compiled(function)


def _splits(groups: int, tiles: int, workers: int) -> int:
    """Into how many parts to cut the sequence, so that every worker has as much to do."""
    for n in range(1, min(workers, tiles) + 1):
        if groups * n % workers == 0 or groups * n >= 8 * workers:
            return n
    return max(1, min(workers, tiles))


_rooms: list[Tensor] = []  # the scratch of all calls, one after the other


def _room(floats: int) -> int:
    """The address of so much scratch; kept, so that a decode step allocates its output only."""
    if not _rooms or _rooms[0].numel() < floats:
        _rooms[:] = [_floats(floats)]
    return _rooms[0].data_ptr()


def _floats(*shape: int) -> Tensor:
    """Room for the compiled code, whatever dtype and device are torch's defaults."""
    return torch.empty(shape, dtype=torch.float32, device=CPU)


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
