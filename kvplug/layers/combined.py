"""Layers of attention and a linear-attention state side by side (Falcon-H1, Zamba2 kinds)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..compat import LinearAttentionLayer
from .growing import Layer
from .static import StaticLayer
from .static_coded import StaticCodedLayer
from .static_sliding import StaticSlidingLayer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class _Combined:
    """Ours for keys and values, transformers' for the state, which does not grow with context.

    Named before both in a class: what is not said here is the attention part's, as its `update`,
    lengths and mask sizes.
    """

    def __init__(self, *args: Any, number_of_states: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Tokens come as two arguments by position, states by name, as in transformers."""
        if args:
            super().lazy_initialization(*args, **kwargs)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    @property
    def is_croppable(self) -> bool:
        """A state cannot be rolled back, but for that of a convolution."""
        return super().is_croppable and LinearAttentionLayer.is_croppable.fget(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens; RuntimeError without a record of them."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens and the state."""
        LinearAttentionLayer.reset(self)
        super().reset()

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._map(change)
        for states in (self.conv_states, self.recurrent_states):
            for i, state in states.items():
                if state is not None:
                    states[i] = change(state)


class CombinedLayer(_Combined, Layer, LinearAttentionLayer):
    """`Layer` and a state."""


class CombinedStaticLayer(_Combined, StaticLayer, LinearAttentionLayer):
    """`StaticLayer` and a state."""


class CombinedStaticCodedLayer(_Combined, StaticCodedLayer, LinearAttentionLayer):
    """`StaticCodedLayer` and a state."""


class CombinedStaticSlidingLayer(_Combined, StaticSlidingLayer, LinearAttentionLayer):
    """`StaticSlidingLayer` and a state."""
