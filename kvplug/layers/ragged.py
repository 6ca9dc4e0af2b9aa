"""A layer whose heads hold different numbers of tokens, each as many as its budget."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from ..attention.heads import Heads
from ..attention.joined import Joined
from ..attention.view import views
from ..compat import CacheLayerMixin
from ..errors import Mismatch
from .base import AttentionLayer, removed
from .scored import ScoredLayer
from .state import nest, part

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..attention.stored import Stored
    from ..codecs.base import Codec
    from .base import Slot
    from .state import State


class HeadsOfOneBudget(ScoredLayer):
    """Some heads of a layer: always views, which a `RaggedLayer` joins."""

    def _kernel_reads(self, S: int, stored: Stored) -> bool:
        return True


class RaggedLayer(AttentionLayer, CacheLayerMixin):
    """Heads of unlike budgets: a `ScoredLayer` for those of each.

    What a group of heads holds, encodes and drops is its own, so that the memory of a small budget
    is really free; attention runs once for each, and the outputs are joined. A method that looks
    across the heads of a layer, as `tova` does, looks across those of a group.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self, slot: Slot) -> None:
        self.slot, self.strategy = slot, slot.strategy
        self.heads = Heads(slot.budgets)
        self.parts: list[ScoredLayer] = []
        for group in self.heads.groups:
            retention = self.strategy.retention.with_budget(slot.budgets[group[0]])
            own = self.strategy.replace(retention=retention)
            own_slot = dataclasses.replace(slot, strategy=own, budgets=None)
            self.parts.append(HeadsOfOneBudget(own_slot))
        self.cuts_blocks, self.record_past = self.parts[0].cuts_blocks, False

    @property
    def is_initialized(self) -> bool:
        """Whether tokens have come, or their dtype and device are known."""
        return self.parts[0].is_initialized

    @property
    def evictions(self) -> int:
        """Of the group that has chosen anew most often."""
        return max(x.evictions for x in self.parts)

    # --- what transformers calls in a forward pass

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn dtype and device from tokens [B, H, S, D].

        Raises Mismatch where H is not the number of heads that there are budgets for.
        """
        if key_states.shape[1] != self.heads.count:
            raise Mismatch(
                f"{self.strategy}: {self.strategy.retention.heads!r} has budgets for "
                f"{self.heads.count} stored heads of a layer, and this model stores "
                f"{key_states.shape[1]}: calibrate it anew"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        for i, x in enumerate(self.parts):
            x.lazy_initialization(self.heads.of(key_states, i), self.heads.of(value_states, i))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As `ScoredLayer.update`: views, of as many columns as the longest group has."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        calls = []
        for i, x in enumerate(self.parts):
            keys, _ = x.update(self.heads.of(key_states, i), self.heads.of(value_states, i))
            calls.append(keys._call)
        joined = Joined(self.heads, tuple(calls), (key_states, value_states))
        return views(joined, calls[0].kernel, self.slot.stats)

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.parts[0].get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As `ScoredLayer.get_mask_sizes`, of the longest group."""
        return max(x.get_mask_sizes(query_length) for x in self.parts)

    def get_max_length(self) -> int:
        """None: -1, as in transformers."""
        return -1

    def set_padding(self, padding: Tensor) -> None:
        for x in self.parts:
            x.set_padding(padding.clone())  # files hold no tensor of shared memory

    def expect(self, tokens: int) -> None:
        for x in self.parts:
            x.expect(tokens)

    def codecs(self) -> set[Codec]:
        return {x.strategy.codec for x in self.parts}

    def prefetch(self) -> None:
        for x in self.parts:
            x.prefetch()

    def settle(self) -> None:
        """As `ScoredLayer.settle`."""
        for x in self.parts:
            x.settle()

    # --- what is held

    def held(self) -> int:
        """Tokens that the next query can see in the longest group."""
        return max(x.held() for x in self.parts)

    def asked(self) -> list[int]:
        return list(self.slot.budgets)

    def kept(self) -> list[int]:
        kept: dict[int, int] = {}
        for heads, x in zip(self.heads.groups, self.parts, strict=True):
            kept |= zip(heads, x.kept(), strict=False)
        return [kept[head] for head in sorted(kept)]

    @property
    def keys(self) -> Tensor | None:
        """The keys a next query can see, dense [B, H, T, Dk], a copy; None before any token.

        T is that of the longest group: others have zeros before their first token.
        """
        return self._dense([x.keys for x in self.parts])

    @property
    def values(self) -> Tensor | None:
        """The values a next query can see, [B, H, T, Dv], as `keys`."""
        return self._dense([x.values for x in self.parts])

    def _dense(self, sides: list[Tensor | None]) -> Tensor | None:
        if sides[0] is None:
            return None
        T = max(x.shape[2] for x in sides)
        return self.heads.join([pad(x, (0, 0, T - x.shape[2], 0)) for x in sides])

    # --- taking back, and changes of the batch

    def activate_past_recording(self) -> None:
        """As `Layer.activate_past_recording`."""
        self.record_past = True
        for x in self.parts:
            x.activate_past_recording()

    def deactivate_past_recording(self) -> None:
        """As `Layer.deactivate_past_recording`."""
        self.record_past = False
        for x in self.parts:
            x.deactivate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """As `Layer.crop`: of all heads, or, where one group has dropped too much, of none."""
        n = removed(tokens_to_remove, self.get_seq_length())
        if not self.is_initialized:
            return
        for x in self.parts:
            x.check_rollback(n)
        for x in self.parts:
            x.crop(-n)

    def reset(self) -> None:
        """Forget all tokens and give their memory back."""
        self.record_past = False
        for x in self.parts:
            x.reset()

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for x in self.parts:
            x._map(change)

    def state(self) -> State:
        state: State = {"budgets": torch.tensor(self.slot.budgets, dtype=torch.int32)}
        for i, x in enumerate(self.parts):
            state |= nest(f"heads.{i}", x.state())
        return state

    def load_state(self, state: State) -> None:
        budgets = tuple(state["budgets"].tolist())
        if budgets != self.slot.budgets:
            raise Mismatch(
                f"heads here keep {self.slot.budgets} tokens and cannot hold a state of heads that "
                f"keep {budgets}: {self.strategy.retention.heads!r} has changed since"
            )
        for i, x in enumerate(self.parts):
            x.load_state(part(state, f"heads.{i}"))
        self.record_past = self.parts[0].record_past
        if self.is_initialized:
            self.dtype, self.device = self.parts[0].dtype, self.parts[0].device
