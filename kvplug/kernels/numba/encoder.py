"""Blocks encoded by compiled loops: the functions of `codecs/integers.py`.

Numbers are turned by torch, as there, and torch adds up their squares: in which order is its own.
All of that is done in scratch that is kept: fresh memory for each layer of a prompt, which the
system has to find and to clear, would take as long as encoding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...codecs.formats import levels
from ...codecs.hadamard import spreader
from ...codecs.integers import LARGEST
from . import process
from .arguments import CPU
from .encode import encode_keys, encode_values

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from torch import Tensor

    from ...codecs.base import Encoded

AT_ONCE = 2**20  # numbers, or those of one block of each row: what scratch holds twice
NO_ORDER = torch.empty((0, 0), dtype=torch.int64, device=CPU).numpy()
NO_WEIGHTS = torch.empty((0, 0, 0), dtype=torch.float32, device=CPU).numpy()
NO_MEANS = torch.empty((0, 0, 0, 0), dtype=torch.float32, device=CPU).numpy()


def keys(x: Tensor, bits: int, rounding: tuple[Tensor, Tensor] | None = None) -> Encoded:
    """`integers.keys`."""
    *place, G, D = x.shape
    codes = torch.empty((*place, D, G * bits // 8), dtype=torch.uint8, device=CPU)
    scale, zero = (torch.empty((*place, D), dtype=torch.float16, device=CPU) for _ in range(2))
    outs = [_rows(y) for y in (codes, scale.view(torch.uint16), zero.view(torch.uint16))]
    order, weights = NO_ORDER, NO_WEIGHTS
    if rounding is not None:
        order, weights = (_rows(y) for y in rounding)
    loop, workers = process.compiled(encode_keys), torch.get_num_threads()
    with process.ONE_AT_A_TIME, process.threads(workers):
        for start, numbers, _ in _turned(x):
            loop(workers, numbers.numpy(), start, bits, order, weights, *outs)
    return {"k_codes": codes, "k_scale": scale, "k_zero": zero}


def values(x: Tensor, bits: int, group: int) -> Encoded:
    """`integers.values`."""
    *place, G, D = x.shape
    codes = torch.empty((*place, G * bits // 8, D), dtype=torch.uint8, device=CPU)
    scale = torch.empty((*place, G, D // group), dtype=torch.uint8, device=CPU)
    outs = _rows(codes), _rows(scale)
    most, means, steps = LARGEST.get(bits, 0.0), NO_MEANS, levels(bits, CPU).numpy()
    loop, workers = process.compiled(encode_values), torch.get_num_threads()
    with process.ONE_AT_A_TIME, process.threads(workers):
        for start, numbers, free in _turned(x):
            if most:
                squares = torch.square(numbers, out=free)
                means = squares.unflatten(-1, (-1, group)).mean(-1).numpy()
            loop(workers, numbers.numpy(), start, means, bits, most, steps, *outs)
    return {"v_codes": codes, "v_scale": scale}


def _rows(x: Tensor) -> Any:
    """X [B, H, ...] as an array [B * H, ...]."""
    return x.flatten(0, 1).contiguous().numpy()


def _turned(x: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Pieces of blocks x [B, H, N, G, D]: the first block of each, `turn` of its blocks
    [B * H, n, G, D], and room of the same shape; both are the next one's too.
    """
    x = x.detach().flatten(0, 1)
    rows, N, G, D = x.shape
    n = max(1, AT_ONCE // (rows * G * D))
    for start in range(0, N, n):
        piece = x[:, start : start + n]
        free, numbers = (y[: piece.numel()].view(piece.shape) for y in _room(piece.numel()))
        free.copy_(piece)
        torch.mm(free.view(-1, D), spreader(D, CPU).T, out=numbers.view(-1, D)).div_(D)
        yield start, numbers, free


_rooms: list[Tensor] = []


def _room(numbers: int) -> list[Tensor]:
    """Two scratch tensors of so many float32, or more."""
    if not _rooms or len(_rooms[0]) < numbers:
        with torch.inference_mode(False):  # any later call may use them
            _rooms[:] = [torch.empty(numbers, dtype=torch.float32, device=CPU) for _ in range(2)]
    return _rooms
