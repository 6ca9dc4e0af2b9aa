"""`static` layers: one compiled graph for a decode step at every length."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from .buffer import lasting
from .compat import StaticLayer as TransformersStaticLayer
from .errors import CacheOverflow
from .gradients import recorded, refuse, refuse_training
from .layer import overflow, removed
from .rows import RowOperations, check_alike, rebatch
from .stored import Stored
from .view import views

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from .codecs.base import Encoded
    from .spec import Strategy
    from .stats import Stats


class StaticLayer(RowOperations, TransformersStaticLayer):
    """transformers' static layer, with rollback, batch operations and overflow that raises.

    The number of tokens is a tensor, changed in place: one compiled graph serves all numbers.
    """

    is_croppable = True

    def __init__(self, strategy: Strategy, stats: Stats) -> None:
        with lasting():
            super().__init__(max_cache_len=strategy.layout.limit)
        self.strategy, self.stats = strategy, stats

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

    def held(self) -> int:
        """Tokens kept: all that were seen."""
        return int(self.cumulative_length)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens; their room is masked and overwritten."""
        self.cumulative_length.sub_(removed(tokens_to_remove, self.held()))

    def reset(self) -> None:
        """Forget all tokens; the room stays, at the address a compiled graph knows."""
        self.cumulative_length.zero_()
        if self.is_initialized:
            self._leave_graph()

    def __deepcopy__(self, memo: dict) -> StaticLayer:
        twin = memo[id(self)] = copy.copy(self)
        with lasting():
            vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

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


class StaticCodedLayer(StaticLayer):
    """Encoded blocks and tail in reserved room.

    blocks: encoded tensors [B, H, N + 1, ...] for N = ceil(max_cache_len / block); the last one is
        a spare
    tail: keys and values [B, H, R, D] of R = codec.tail + block tokens, the oldest first

    A compiled step encodes the oldest block of the tail each time and writes it to its place when
    it is due, to the spare block when it is not: no branch, so one graph. It decodes one layer at a
    time, fused by the compiler. Eager steps encode only what is due and return views, as `Layer`
    does. While the past is recorded steps are eager: how much waits for `crop` has no fixed shape.
    """

    def __init__(self, strategy: Strategy, stats: Stats) -> None:
        # not super().__init__: it would assign keys and values, which are decoded on demand here
        self.strategy, self.stats, self.max_cache_len = strategy, stats, strategy.layout.limit
        with lasting():
            self.cumulative_length = torch.tensor(0)
        self.is_initialized = self.record_past = False
        # keys and values that the tail has no room for while the past is recorded
        self.waiting: list[Tensor] | None = None

    @property
    def is_compileable(self) -> bool:
        """Not while the past is recorded."""
        return not self.record_past

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Reserve the room; key_states [B, H, S, Dk], value_states [B, H, S, Dv]."""
        codec = self.strategy.codec
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = key_states.shape[0]
        N, R = -(-self.max_cache_len // codec.block), codec.tail + codec.block
        self.tail = [x.new_zeros(*x.shape[:2], R, x.shape[-1]) for x in (key_states, value_states)]
        block = codec.encode(*(x[:, :, : codec.block].unsqueeze(2) for x in self.tail))
        self.blocks: Encoded = {
            name: x.repeat(1, 1, N + 1, *[1] * (x.dim() - 3)) for name, x in block.items()
        }
        self.cumulative_length = self.cumulative_length.to(self.device)
        self.block_count = torch.zeros((), dtype=torch.long, device=self.device)
        if not torch.compiler.is_compiling():
            for x in (*self.blocks.values(), *self.tail, self.cumulative_length, self.block_count):
                torch._dynamo.mark_static_address(x)
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All room for a decode step, whose shapes must not change; else what is in use."""
        self._check_room(query_length)
        return (
            self.max_cache_len if self._gives_all(query_length) else self.held() + query_length
        ), 0

    def _gives_all(self, S: int) -> bool:
        """Whether S new tokens get all room, empty columns included.

        Not while the past is recorded: transformers masks those of a cache that compiles, alone.
        """
        return S == 1 and not self.record_past

    @property
    def keys(self) -> Tensor | None:
        """The keys held, dense [B, H, T, Dk], a copy; None before the first token."""
        return self._stored(self._rest()).side(0) if self.is_initialized and self.held() else None

    @property
    def values(self) -> Tensor | None:
        """The values held, dense [B, H, T, Dv], a copy; None before the first token."""
        return self._stored(self._rest()).side(1) if self.is_initialized and self.held() else None

    def activate_past_recording(self) -> None:
        """From now on encode nothing until `crop`, so that a rollback leaves no trace."""
        self.record_past = True

    def deactivate_past_recording(self) -> None:
        """Encode again, beginning with what recording has held back."""
        self.record_past = False
        if self.is_initialized:
            self._settle(self._rest())

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens; encode what recording has held back.

        A block that is cut returns to the tail as it was stored.
        """
        seen = self.held() - removed(tokens_to_remove, self.held())
        if not self.is_initialized:
            return
        block = self.strategy.codec.block
        if seen < int(self.block_count) * block:
            n = seen // block
            opened = self.strategy.codec.decode(
                {name: x[:, :, n : n + 1] for name, x in self.blocks.items()}
            )
            for tail, x in zip(self.tail, opened, strict=True):
                tail[:, :, :block] = x.flatten(2, 3)
            self.block_count.fill_(n)
        self.cumulative_length.fill_(seen)
        self._settle(self._rest())

    def reset(self) -> None:
        """Forget all tokens; the room stays, at the address a compiled graph knows."""
        super().reset()
        self.record_past, self.waiting = False, None
        if self.is_initialized:
            self.block_count.zero_()

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.blocks = {name: rebatch(x, change) for name, x in self.blocks.items()}
            self.tail = [rebatch(x, change) for x in self.tail]
            if self.waiting is not None:
                self.waiting = [change(x) for x in self.waiting]
            self.batch_size = self.tail[0].shape[0]

    def _rest(self) -> list[Tensor]:
        """Keys and values that are not encoded."""
        n = self.held() - int(self.block_count) * self.strategy.codec.block
        rows = self.tail
        if self.waiting is not None:
            rows = [torch.cat(pair, dim=2) for pair in zip(rows, self.waiting, strict=True)]
        return [x[:, :, :n] for x in rows]

    def _stored(self, tail: list[Tensor], empty: int = 0) -> Stored:
        blocks = {name: x[:, :, : int(self.block_count)] for name, x in self.blocks.items()}
        return Stored(self.strategy.codec, None, blocks, 0, tuple(tail), empty)

    def _held(self) -> tuple[Tensor, Tensor]:
        return self.tail[0], self.tail[1]

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        graph = None
        if recorded(keys, values):
            if not torch.compiler.is_compiling():
                refuse_training(self.strategy)
            graph, keys, values = (keys, values), keys.detach(), values.detach()
        if torch.compiler.is_compiling():
            one = keys.shape[2] == 1 and not self.record_past
            step = self._compiled_step if one else self._step_between_graphs
            dense = step(keys, values)
            return dense if graph is None else refuse(self.strategy, graph, dense)
        stored = self._add(keys, values)
        if graph is not None:
            tail = refuse(self.strategy, graph, stored.tail)
            stored = dataclasses.replace(stored, tail=tail)
        if not (stored.blocks and stored.block_count) and not stored.empty:
            return stored.tail
        kernel = self.strategy.kernel.resolve(stored.codec, self.device, self.dtype)
        return views(stored, kernel, self.stats)

    @torch.compiler.disable
    def _step_between_graphs(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A step of several tokens, or one that records the past, in a compiled model."""
        return self._add(keys, values).dense()

    def _add(self, keys: Tensor, values: Tensor) -> Stored:
        """Take new tokens; return what they attend to."""
        rows = [torch.cat(pair, dim=2) for pair in zip(self._rest(), (keys, values), strict=True)]
        self.cumulative_length.add_(keys.shape[2])
        empty = self.max_cache_len - self.held() if self._gives_all(keys.shape[2]) else 0
        stored = self._stored(rows, empty)
        if self.record_past:
            R = self.tail[0].shape[2]
            self._fill_tail([x[:, :, :R] for x in rows])
            self.waiting = [x[:, :, R:] for x in rows]
        else:
            self._settle(rows)
        return stored

    def _settle(self, rows: list[Tensor]) -> None:
        """Encode the blocks of `rows`, what is not encoded, that are due; the tail has the rest."""
        codec = self.strategy.codec
        n = max(0, (rows[0].shape[2] - codec.tail) // codec.block)  # blocks that are due
        if n:
            due = codec.encode(
                *(x[:, :, : n * codec.block].unflatten(2, (n, codec.block)) for x in rows)
            )
            for name, x in due.items():
                self.blocks[name][:, :, int(self.block_count) : int(self.block_count) + n] = x
            self.block_count.add_(n)
            self.stats.blocks_encoded += n
            rows = [x[:, :, n * codec.block :].clone() for x in rows]  # may be rows of the tail
        self._fill_tail(rows)
        self.waiting = None

    def _fill_tail(self, rows: list[Tensor]) -> None:
        for tail, x in zip(self.tail, rows, strict=True):
            tail[:, :, : x.shape[2]] = x

    def _compiled_step(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        codec, R = self.strategy.codec, self.tail[0].shape[2]
        N = next(iter(self.blocks.values())).shape[2] - 1
        row = self.cumulative_length - self.block_count * codec.block
        for tail, x in zip(self.tail, (keys, values), strict=True):
            tail.index_copy_(2, row[None], x)
        self.cumulative_length.add_(1)
        # columns: decoded blocks first, the tail after them
        in_tail = (
            torch.arange(self.max_cache_len, device=keys.device) - self.block_count * codec.block
        )
        decoded = codec.decode({name: x[:, :, :N] for name, x in self.blocks.items()})
        dense = []
        for tail, x in zip(self.tail, decoded, strict=True):
            newest = tail.index_select(2, in_tail.clamp(0, R - 1))
            oldest = x.flatten(2, 3)[:, :, : self.max_cache_len].to(tail.dtype)
            dense.append(torch.where((in_tail >= 0)[:, None], newest, oldest))
        due = row + 1 == R
        encoded = codec.encode(*(x[:, :, : codec.block].unsqueeze(2) for x in self.tail))
        for name, x in encoded.items():
            self.blocks[name].index_copy_(2, torch.where(due, self.block_count, N)[None], x)
        for tail in self.tail:
            tail.copy_(torch.where(due, tail.roll(-codec.block, 2), tail))
        self.block_count.add_(due)
        return dense[0], dense[1]
