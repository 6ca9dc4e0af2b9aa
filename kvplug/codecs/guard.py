"""Keys that swing: their numbers move far within a block, and little from token to token.

A step is the range of a channel's numbers in a block, over the codes there are. Text alone moves
keys as much from one token to the next as within a block. A large constant in a key channel, once
rotary positions turn it, moves slowly and far, and so does every channel that it was spread over:
steps grow, and what text says in the other channels is lost (where it moves not at all within a
block, the zero of a block takes it). A constant that goes round in fewer than some 14 tokens moves
fast, and is not told from text.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 2.0  # times as far as independent numbers would move; SmolLM2: 1.2 to 1.7


@torch.compiler.disable  # one number decides, once in a layer's life
def swings(numbers: Tensor) -> bool:
    """Whether keys [B, H, N, G, D] that were turned do so, in the mean over heads of some row.

    Blocks of fewer than 2 tokens, numbers without memory and such as are not finite do not.
    """
    G = numbers.shape[3]
    if numbers.is_meta or not numbers.numel() or G < 2:
        return False
    between = numbers.diff(dim=3).square().mean(3).sqrt() / 2**0.5  # of independent ones: sigma
    within = numbers.amax(3) - numbers.amin(3)
    # the mean range of G independent normal numbers (Blom, 1958)
    expected = 2 * torch.special.ndtri(torch.tensor((G - 0.375) / (G + 0.25)))
    moves = within > 0  # others are nothing but a zero
    times = torch.where(moves, within / between.clamp_min(1e-30) / expected, 0.0)
    return bool((times.sum((1, 2, 3)) > MOST * moves.sum((1, 2, 3))).any())
