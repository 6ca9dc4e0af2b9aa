"""Layers of attention and a linear-attention state side by side (Falcon-H1, Zamba2 kinds)."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Self

from ..compat import LinearAttentionLayer
from .state import attributes, nest, part, set_attributes

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from .base import AttentionLayer, Slot
    from .state import State


class Combined:
    """Ours for keys and values, transformers' for the state, which does not grow with context.

    Named before both in a class: what is not said here is the attention part's, as its `update`,
    lengths and mask sizes.
    """

    attention: type[AttentionLayer]
    by_chunks = False  # the state of every chunk would have to be kept

    def __init__(self, slot: Slot, number_of_states: int) -> None:
        super().__init__(slot)
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

    def state(self) -> State:
        return super().state() | nest("state", attributes(self, self._of_state()))

    def load_state(self, state: State) -> None:
        super().load_state(state)
        set_attributes(self, part(state, "state"))

    def _of_state(self) -> list[str]:
        """The attributes that transformers' part has of its own."""
        theirs = vars(LinearAttentionLayer(number_of_states=self.number_of_states))
        return sorted(theirs.keys() - {"dtype", "device", "record_past"})

    def _blank(self, slot: Slot) -> Self:
        return type(self)(slot, self.number_of_states)

    def __reduce__(self) -> tuple:
        """Other processes make the class anew."""
        return _blank, (self.attention,), self.__getstate__()


@cache
def with_state(attention: type[AttentionLayer]) -> type[AttentionLayer]:
    """The class of layers that hold what `attention` holds, and a state."""
    name = f"Combined{attention.__name__}"
    return type(name, (Combined, attention, LinearAttentionLayer), {"attention": attention})


def _blank(attention: type[AttentionLayer]) -> AttentionLayer:
    kind = with_state(attention)
    return kind.__new__(kind)
