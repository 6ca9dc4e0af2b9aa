"""The matrix that spreads what is large in one channel over all channels of a head."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


def spreader(n: int, device: torch.device) -> Tensor:
    """U [n, n] float32 with U @ U.T = n * 1, and no entry above sqrt(2).

    Where n is a power of two, Sylvester's Hadamard matrix of 1 and -1 (QuaRot, arXiv:2404.00456);
    else its Kronecker product with the discrete cosine transform of the odd part of n.
    """
    return (_spreader if torch.compiler.is_compiling() else _kept)(n, device)


def turn(x: Tensor) -> Tensor:
    """U x / D of x [..., D] of any float dtype: float32."""
    D = x.shape[-1]
    return (x.float() @ spreader(D, x.device).T) / D


def _spreader(n: int, device: torch.device) -> Tensor:
    odd = n // (n & -n)
    i = torch.arange(n, device=device)
    common = (i // odd)[:, None] & (i // odd)
    for shift in (16, 8, 4, 2, 1):  # the parity of its bits
        common = common ^ (common >> shift)
    frequency, at = (i % odd)[:, None], (i % odd).double() + 0.5
    wave = torch.cos(math.pi / odd * frequency * at) * math.sqrt(2)
    wave = torch.where(frequency == 0, 1.0, wave)
    return torch.where(common & 1 == 1, -wave, wave).float()


@cache
def _kept(n: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # any later call may use it
        return _spreader(n, device)
