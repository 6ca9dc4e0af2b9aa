"""What a kernel is compiled for, and how many programs share its work."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
import triton

from ...codecs.formats import PLANES

if TYPE_CHECKING:
    from ...codecs.base import Codec

PROGRAMS = 4  # per multiprocessor: twice as many as its registers hold evens out the end
STEPS = 2  # of one program, at least: merging many short shares costs more than sharing saves
SPLITS = 128  # of one head, at most: the merging kernel holds all shares of a row at once


@dataclass(frozen=True)
class Sizes:
    """What the kernel is compiled for."""

    CAUSAL: bool
    DK: int
    DV: int
    K: int  # DK, padded
    GROUP: int  # value channels of one scale
    GROUPS: int  # padded
    WIDTH: int  # GROUP, padded
    ROWS: int  # at once
    TILE: int  # tokens as they came at once
    warps: int
    stages: int
    K_BITS: int = 0  # 0: the middle is tokens as they came
    V_BITS: int = 0
    K_LOW: int = 0  # of these, in the first plane
    V_LOW: int = 0
    BLOCK: int = 1  # tokens
    STEP: int = 1  # tokens of a block at once
    RUNS: int = 1  # of consecutive tokens in a step
    PAD: int = 1  # tokens of a run, padded
    TURNED: bool = False  # blocks of the format `rotated`, or `rotated_planes`


@cache
def sizes_of(
    rows: int, Dk: int, Dv: int, itemsize: int, is_causal: bool, codec: Codec, groups: int
) -> Sizes:
    """Sizes by rule; groups: scales per value, 0 without encoded blocks.

    A rule and not `triton.autotune`, which times all candidates anew for each new key, in the
    middle of an answer. Decoding is bound by memory, which several small programs per
    multiprocessor hide.
    """
    heavy = max(1, _padded(max(Dk, Dv)) * itemsize // 256)  # 128 channels of 16 bits: 1
    ROWS = min(_padded(rows), max(16, 64 // heavy))
    light = ROWS == 16 and heavy == 1
    GROUPS = triton.next_power_of_2(groups or 1)
    common = {
        "CAUSAL": is_causal,
        "DK": Dk,
        "DV": Dv,
        "K": _padded(Dk),
        "GROUP": Dv // (groups or 1),
        "GROUPS": GROUPS,
        "WIDTH": _padded(Dv // (groups or 1), 16 // GROUPS),
        "ROWS": ROWS,
        "TILE": max(16, min(64 // heavy, 32 if ROWS == 16 else 64)),
        "warps": 4 if light else 8,
        "stages": 3 if light else 2,
    }
    if not groups:
        return Sizes(**common, STEP=common["TILE"])
    step = min(codec.block, 64 if itemsize == 2 else 64 // heavy)
    k_low, v_low = (PLANES.get(bits, bits) for bits in (codec.k_bits, codec.v_bits))
    # planes of 1 bit have runs of their own
    planes = k_low, v_low, codec.k_bits - k_low, codec.v_bits - v_low
    RUNS = 8 // min(bits for bits in planes if bits > 1)
    return Sizes(
        **common,
        K_BITS=codec.k_bits,
        V_BITS=codec.v_bits,
        K_LOW=k_low,
        V_LOW=v_low,
        BLOCK=codec.block,
        STEP=step,
        RUNS=RUNS,
        PAD=_padded(step) // RUNS,
        TURNED=codec.format in ("rotated", "rotated_planes"),
    )


def _padded(n: int, least: int = 16) -> int:
    """The next power of two, and as much as tensor cores ask."""
    return max(least, triton.next_power_of_2(n))


def share_of(steps: int, programs: int, device: torch.device) -> int:
    """Steps of one program: so many that the device is full, and that each has enough to do."""
    splits = min(SPLITS, max(1, PROGRAMS * _multiprocessors(device) // programs))
    return max(STEPS, triton.cdiv(steps, splits))


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # interpreted
    return torch.cuda.get_device_properties(device).multi_processor_count
