"""`static` with a codec: encoded blocks and a tail in reserved room."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from ..attention.gradients import recorded, refuse, refuse_training
from ..attention.stored import Stored
from ..attention.view import views
from .base import removed
from .batch import rebatch
from .buffer import lasting, resized
from .state import nest, rows
from .static import StaticLayer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..codecs.base import Encoded
    from .base import Slot
    from .state import State


class StaticCodedLayer(StaticLayer):
    """Encoded blocks and tail in reserved room.

    blocks: encoded tensors [B, H, N + 1, ...] for N = ceil(max_cache_len / block); the last one is
        a spare
    tail: keys and values [B, H, R, D] of R = F + codec.tail + block tokens, the oldest first; the
        first F = codec.first of them stay: blocks begin at column F. Of a row that is padded these
        are padding, and its first tokens are encoded

    A compiled step encodes the oldest block of the tail each time and writes it to its place when
    it is due, to the spare block when it is not: no branch, so one graph. It decodes one layer at a
    time, fused by the compiler. Eager steps encode only what is due and return views, as `Layer`
    does. While the past is recorded steps are eager: how much waits for `crop` has no fixed shape.
    """

    cuts_blocks = True

    def __init__(self, slot: Slot) -> None:
        # not super().__init__: it would assign keys and values, which are decoded on demand here
        self.slot, self.strategy, self.stats = slot, slot.strategy, slot.stats
        self.max_cache_len = self.strategy.layout.limit
        self.first = self.strategy.codec.first  # F
        with lasting():
            self.cumulative_length = torch.tensor(0)
        self.is_initialized = self.record_past = False
        # keys and values that the tail has no room for while the past is recorded
        self.waiting: list[Tensor] | None = None

    @property
    def is_compileable(self) -> bool:
        """Not while the past is recorded."""
        return not self.record_past

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As `StaticLayer.update`; room is reserved for the codec that a prompt's keys want."""
        if not self.is_initialized and not torch.compiler.is_compiling():
            codec, F = self.strategy.codec, self.first
            if n := max(0, key_states.shape[2] - F - codec.tail) // codec.block:
                keys = key_states[:, :, F : F + n * codec.block].unflatten(2, (n, codec.block))
                self._judge(keys)
        return super().update(key_states, value_states, *args, **kwargs)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Reserve the room; key_states [B, H, S, Dk], value_states [B, H, S, Dv]."""
        codec = self.strategy.codec
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = key_states.shape[0]
        R = self.first + codec.tail + codec.block
        self.tail = [x.new_zeros(*x.shape[:2], R, x.shape[-1]) for x in (key_states, value_states)]
        block = codec.encode(*(x[:, :, : codec.block].unsqueeze(2) for x in self.tail))
        self.blocks: Encoded = {
            name: x.repeat(1, 1, self._block_room(), *[1] * (x.dim() - 3))
            for name, x in block.items()
        }
        self.cumulative_length = self.cumulative_length.to(self.device)
        self.block_count = torch.zeros((), dtype=torch.long, device=self.device)
        if not torch.compiler.is_compiling():
            for x in (*self.blocks.values(), *self.tail, self.cumulative_length, self.block_count):
                torch._dynamo.mark_static_address(x)
        self.is_initialized = True

    def _block_room(self) -> int:
        return 1 - (-self.max_cache_len // self.strategy.codec.block)  # rounded up, and the spare

    def _resize(self) -> None:
        for name, x in self.blocks.items():
            self.blocks[name] = resized(x, self._block_room())

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
        F, block, count = self.first, self.strategy.codec.block, int(self.block_count)
        if count and seen < F + count * block:
            n = max(0, seen - F) // block
            opened = self.strategy.codec.decode(
                {name: x[:, :, n : n + 1] for name, x in self.blocks.items()}
            )
            for tail, x in zip(self.tail, opened, strict=True):
                tail[:, :, F : F + block] = x.flatten(2, 3)
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
        head = None
        if self.first and int(self.block_count):
            head = tuple(x[:, :, : self.first] for x in tail)
            tail = [x[:, :, self.first :] for x in tail]
        return Stored(self.strategy.codec, head, blocks, 0, tuple(tail), empty)

    def encoded(self) -> tuple[int, int, Encoded | None]:
        """The first column that lies in a block, the first after these, and the blocks."""
        n = int(self.block_count) if self.is_initialized else 0
        if not n:
            return 0, 0, None
        blocks = {name: x[:, :, :n] for name, x in self.blocks.items()}
        return self.first, self.first + n * self.strategy.codec.block, blocks

    def state(self) -> State:
        state: State = {"seen": self.held(), "record_past": self.record_past}
        if not self.is_initialized:
            return state
        n = int(self.block_count)
        blocks = {name: x[:, :, :n] for name, x in self.blocks.items()}
        keys, values = self._rest()
        return state | nest("blocks", blocks) | {"tail.k": keys, "tail.v": values}

    def load_state(self, state: State) -> None:
        self.reset()
        self.record_past = state["record_past"]
        tail = list(rows(state, "tail").values())
        if tail:
            blocks = rows(state, "blocks")
            self._take(self.slot.strategy.codec.that_made(blocks))
            with lasting():
                self.lazy_initialization(*tail)
            for name, x in blocks.items():
                self.blocks[name][:, :, : x.shape[2]] = x
                self.block_count.fill_(x.shape[2])
            R = self.tail[0].shape[2]
            self._fill_tail([x[:, :, :R] for x in tail])
            if tail[0].shape[2] > R:
                self.waiting = [x[:, :, R:].clone() for x in tail]
        self.cumulative_length.fill_(state["seen"])

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
        codec, F = self.strategy.codec, self.first
        n = max(0, (rows[0].shape[2] - F - codec.tail) // codec.block)  # blocks that are due
        if n:
            end = F + n * codec.block
            due = codec.encode(*(x[:, :, F:end].unflatten(2, (n, codec.block)) for x in rows))
            for name, x in due.items():
                self.blocks[name][:, :, int(self.block_count) : int(self.block_count) + n] = x
            self.block_count.add_(n)
            self.stats.encoded(n, codec.encoder(self.device))
            rows = [torch.cat((x[:, :, :F], x[:, :, end:]), dim=2) for x in rows]
        self._fill_tail(rows)
        self.waiting = None

    def _fill_tail(self, rows: list[Tensor]) -> None:
        for tail, x in zip(self.tail, rows, strict=True):
            tail[:, :, : x.shape[2]] = x

    def _compiled_step(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        codec, F, R = self.strategy.codec, self.first, self.tail[0].shape[2]
        N = next(iter(self.blocks.values())).shape[2] - 1
        row = self.cumulative_length - self.block_count * codec.block
        for tail, x in zip(self.tail, (keys, values), strict=True):
            tail.index_copy_(2, row[None], x)
        self.cumulative_length.add_(1)
        # columns: first tokens, decoded blocks, the rest of the tail
        in_tail = (
            torch.arange(self.max_cache_len, device=keys.device) - self.block_count * codec.block
        )
        decoded = codec.decode({name: x[:, :, :N] for name, x in self.blocks.items()})
        dense = []
        for tail, x in zip(self.tail, decoded, strict=True):
            newest = tail.index_select(2, in_tail.clamp(0, R - 1))
            oldest = torch.cat((tail[:, :, :F], x.flatten(2, 3).to(tail.dtype)), dim=2)
            oldest = oldest[:, :, : self.max_cache_len]
            dense.append(torch.where((in_tail >= F)[:, None], newest, oldest))
        due = row + 1 == R
        first = slice(F, F + codec.block)
        encoded = codec.encode(*(x[:, :, first].unsqueeze(2) for x in self.tail))
        for name, x in encoded.items():
            self.blocks[name].index_copy_(2, torch.where(due, self.block_count, N)[None], x)
        for tail in self.tail:
            rest = tail[:, :, F:]
            rest.copy_(torch.where(due, rest.roll(-codec.block, 2), rest))
        self.block_count.add_(due)
        return dense[0], dense[1]
