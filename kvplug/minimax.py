"""MiniMax's models take no cache but their own class: this is it, and one of ours."""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING

import transformers

from .cache import Cache, send
from .compat import MINIMAX, find

if TYPE_CHECKING:
    from torch import Tensor


class MiniMax(Cache, find(*MINIMAX)):
    """A `Cache` that MiniMax's models know.

    Their class keeps the states of linear-attention layers in a list beside its layers; here they
    are in the layers that transformers has for states, so that beams, copies and files take them
    along, and what their class changes for the sake of that list is undone. As in theirs, nothing
    can be taken back: a state does not know what it was.
    """

    __len__ = transformers.Cache.__len__
    batch_repeat_interleave = transformers.Cache.batch_repeat_interleave
    batch_select_indices = transformers.Cache.batch_select_indices

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        """The state [B, H, D, D] of a linear-attention layer; None before its first tokens."""
        return self.layers[layer_idx].recurrent_states[0]

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        """Keep the state [B, H, D, D] after the newest token."""
        self.layers[layer_idx].update_recurrent_state(linear_cache)


ForkingPickler.register(MiniMax, send)
