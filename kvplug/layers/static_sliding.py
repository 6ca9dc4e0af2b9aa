"""transformers' static layer of sliding-window attention, with rollback and batch operations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..attention.gradients import recorded, refuse, refuse_training
from ..compat import StaticSlidingWindowLayer
from ..errors import CacheOverflow, Evicted
from .base import AttentionLayer, overflow, removed
from .batch import check_alike, rebatch
from .buffer import lasting, resized
from .state import nest, rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from .base import Slot
    from .state import State


class StaticSlidingLayer(AttentionLayer, StaticSlidingWindowLayer):
    """The newest `max_cache_len` tokens in full precision, in room reserved once.

    The model's own window; where the room reserved is less, nothing slides and more tokens raise.
    While the past is recorded, tokens that leave the window are kept aside until `crop`.
    """

    def __init__(self, slot: Slot) -> None:
        self.slot, self.strategy, window = slot, slot.strategy, slot.sliding_window
        self.sliding_window = window
        max_cache_len = self.strategy.layout.limit
        with lasting():
            super().__init__(max_cache_len=max_cache_len, sliding_window=window)
        self.never_slides = max_cache_len < window
        self.record_past = False
        # keys and values [B, H, T, D] of the window before the record and of all tokens since
        self._past: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens [B, H, S, D]; return columns [B, H, T, D] as `get_mask_sizes` announced.

        Errors are as `Layer.update` says; gradients are refused, as the window slides in place.
        """
        self._check_room(key_states.shape[2])
        if not self.is_initialized:
            with lasting():
                self.lazy_initialization(key_states, value_states)
        check_alike((self.keys, self.values), (key_states, value_states))
        graph = None
        if recorded(key_states, value_states):
            refuse_training(self.strategy)
            graph = key_states, value_states
            key_states, value_states = key_states.detach(), value_states.detach()
        if self.record_past:
            past = self._past or self._in_use()
            self._past = (
                torch.cat((past[0], key_states), dim=2),
                torch.cat((past[1], value_states), dim=2),
            )
        visible = super().update(key_states, value_states)
        return visible if graph is None else refuse(self.strategy, graph, visible)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All room; more once the window slides and `query_length` tokens come at once."""
        self._check_room(query_length)
        return super().get_mask_sizes(query_length)

    def resize(self, limit: int) -> None:
        super().resize(limit)
        room = min(limit, self.sliding_window)
        self.never_slides = limit < self.sliding_window
        self.max_cache_len = room
        if self.is_initialized:  # where the room changes, nothing has slid yet
            self.keys, self.values = resized(self.keys, room), resized(self.values, room)

    def held(self) -> int:
        return min(self.cumulative_length_int, self.max_cache_len)

    def _check_room(self, S: int) -> None:
        if self.never_slides and self.cumulative_length_int + S > self.max_cache_len:
            raise CacheOverflow(overflow(self.max_cache_len, self.cumulative_length_int, S))

    def _in_use(self) -> tuple[Tensor, Tensor]:
        return self.keys[:, :, : self.held()], self.values[:, :, : self.held()]

    def activate_past_recording(self) -> None:
        """From now on keep what leaves the window until `crop`, so that a rollback is exact."""
        self.record_past = True

    def deactivate_past_recording(self) -> None:
        """Keep the window alone again."""
        self.record_past, self._past = False, None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens, and what recording has kept aside.

        Raises:
            Evicted: tokens that would be in the window then have left it; call
                `activate_past_recording` first.
        """
        n = removed(tokens_to_remove, self.cumulative_length_int)
        if not self.is_initialized:
            return
        past = self._past or self._in_use()
        seen = self.cumulative_length_int - n
        held = min(seen, self.max_cache_len)
        have = past[0].shape[2] - n
        if n and have < held:
            raise Evicted(
                f"cannot crop {n} of {self.cumulative_length_int} tokens: the window of "
                f"{self.max_cache_len} has dropped some that would be visible then; call "
                "activate_past_recording() before such tokens come"
            )
        if n:
            for room, x in zip((self.keys, self.values), past, strict=True):
                room[:, :, :held] = x[:, :, have - held : have].clone()
            self.cumulative_length_int = seen
            self.cumulative_length.fill_(held)
        self._past = None

    def reset(self) -> None:
        """Forget all tokens; the room stays, at the address a compiled graph knows."""
        self.deactivate_past_recording()
        self.cumulative_length_int = 0
        self.cumulative_length.zero_()

    def state(self) -> State:
        state: State = {"seen": self.cumulative_length_int, "record_past": self.record_past}
        window = self._in_use() if self.is_initialized else ()
        for prefix, pair in (("window", window), ("past", self._past or ())):
            state |= nest(prefix, dict(zip("kv", pair, strict=False)))
        return state

    def load_state(self, state: State) -> None:
        self.reset()
        if window := rows(state, "window"):
            with lasting():
                self.lazy_initialization(window["k"], window["v"])
            for room, x in zip((self.keys, self.values), window.values(), strict=True):
                room[:, :, : x.shape[2]] = x
        if past := rows(state, "past"):
            self._past = past["k"].clone(), past["v"].clone()
        self.record_past, self.cumulative_length_int = state["record_past"], state["seen"]
        self.cumulative_length.fill_(self.held())

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = rebatch(self.keys, change), rebatch(self.values, change)
            self.batch_size = self.keys.shape[0]
            if self._past is not None:
                self._past = change(self._past[0]), change(self._past[1])
