"""`static` layers: one compiled graph for a decode step at every length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..attention.gradients import recorded
from ..compat import StaticLayer as TransformersStaticLayer
from ..errors import CacheOverflow
from .base import AttentionLayer, overflow, removed
from .batch import check_alike, rebatch
from .buffer import lasting, resized

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from .base import Slot
    from .state import State


class StaticLayer(AttentionLayer, TransformersStaticLayer):
    """transformers' static layer, with rollback, batch operations and overflow that raises.

    The number of tokens is a tensor, changed in place: one compiled graph serves all numbers.
    """

    def __init__(self, slot: Slot) -> None:
        self.slot, self.strategy, self.stats = slot, slot.strategy, slot.stats
        with lasting():
            super().__init__(max_cache_len=self.strategy.layout.limit)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens [B, H, S, D]; return columns [B, H, T, D] as `get_mask_sizes` announced.

        What it returns, gradients and errors are as `Layer.update` says; but that changes of the
        batch write to the room in place, and with it to what was returned before.
        """
        if not self.is_initialized:
            with lasting():
                self.lazy_initialization(key_states, value_states)
        check_alike(self._held(), (key_states, value_states))
        self._check_room(key_states.shape[-2])
        return self._append(key_states, value_states)

    def _held(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        held = self.keys, self.values
        if recorded(keys, values, *held):  # to fresh room: the graph of earlier tokens stays whole
            S = keys.shape[-2]
            position = torch.arange(S, device=self.device) + self.cumulative_length
            self.keys = self.keys.index_copy(2, position, keys)
            self.values = self.values.index_copy(2, position, values)
            self.cumulative_length.add_(S)
            return self.keys, self.values
        self._leave_graph()
        return super().update(keys, values)  # all room: transformers' mask hides what is empty

    def _leave_graph(self) -> None:
        if any(x.requires_grad for x in self._held()):
            with lasting():
                self.keys, self.values = (x.detach().clone() for x in self._held())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All room, from column 0."""
        self._check_room(query_length)
        return self.max_cache_len, 0

    def resize(self, limit: int) -> None:
        super().resize(limit)
        self.max_cache_len = limit
        if self.is_initialized:
            self._resize()

    def _resize(self) -> None:
        # the old room of keys is gone before that of values is made
        self.keys = resized(self.keys, self.max_cache_len)
        self.values = resized(self.values, self.max_cache_len)

    def held(self) -> int:
        return int(self.cumulative_length)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens; their room is masked and overwritten."""
        self.cumulative_length.sub_(removed(tokens_to_remove, self.held()))

    def reset(self) -> None:
        """Forget all tokens; the room stays, at the address a compiled graph knows."""
        self.cumulative_length.zero_()
        if self.is_initialized:
            self._leave_graph()

    def state(self) -> State:
        n = self.held()
        held = {"k": self.keys[:, :, :n], "v": self.values[:, :, :n]} if self.is_initialized else {}
        return {"seen": n} | held

    def load_state(self, state: State) -> None:
        self.reset()
        if "k" in state:
            with lasting():
                self.lazy_initialization(state["k"], state["v"])
            for room, x in ((self.keys, state["k"]), (self.values, state["v"])):
                room[:, :, : x.shape[2]] = x
        self.cumulative_length.fill_(state["seen"])

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = rebatch(self.keys, change), rebatch(self.values, change)
            self.batch_size = self.keys.shape[0]

    def _check_room(self, S: int) -> None:
        if torch.compiler.is_compiling():
            check_room(self.cumulative_length, S, self.max_cache_len)
        elif self.cumulative_length.device.type != "meta":
            _raise_if_full(self.cumulative_length, S, self.max_cache_len)


@torch.library.custom_op(
    "kvplug::check_room",
    mutates_args=("length",),
    schema="(Tensor(a!) length, int S, int limit) -> ()",
)
def check_room(length: Tensor, S: int, limit: int) -> None:
    """Stop a compiled step that would overflow, before it writes.

    Opaque to the compiler, so that it raises from Python: an assertion inside generated code may
    end the process. `length` [] is said to change, which it does not: what follows waits for it.
    """
    if length.device.type == "cpu":
        _raise_if_full(length, S, limit)
    else:
        torch._assert_async(length + S <= limit)  # reading the number would stall the device


@check_room.register_fake
def _(length: Tensor, S: int, limit: int) -> None: ...


def _raise_if_full(length: Tensor, S: int, limit: int) -> None:
    if int(length) + S > limit:
        raise CacheOverflow(overflow(limit, int(length), S))
