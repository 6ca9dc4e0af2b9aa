"""Sizes that wrapper and compiled code share, and how compiled functions are declared."""

import math

import numpy as np
from numba import njit
from numba.extending import register_jitable

from .simd import LANES

TILE = 64  # columns at a time
ROWS = 32  # query rows at a time, of which two or three meet a tile
LOG2E = np.float32(math.log2(math.e))
LOWEST = np.float32(-np.inf)
ZERO, ONE = np.float32(0), np.float32(1)

inlined = njit(forceinline=True, error_model="numpy")


@register_jitable
def scratch_of(Dk, width):
    """Floats that a worker needs: a tile of keys and of values, its query rows, their scores."""
    return TILE * (Dk + width) + ROWS * (2 * in_lanes(Dk) + TILE)


@register_jitable
def in_lanes(n):
    """The least number of whole vectors that hold n floats, in floats."""
    return (n + LANES - 1) // LANES * LANES


@register_jitable
def partial_of(width):
    """Floats that a task leaves: running maximum, sum and output of each row."""
    return ROWS * (2 + width)
