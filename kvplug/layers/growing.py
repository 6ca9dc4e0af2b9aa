"""One layer's cache: retention -> layout -> codec -> placement, as a layer of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..attention.gradients import recorded, refuse_training
from ..attention.view import Watch
from ..codecs.feedback import second_moment
from ..compat import CacheLayerMixin
from ..errors import CacheOverflow, Evicted
from ..placement.device import OnDevice
from ..retention.window import Window
from .base import overflow, removed
from .batch import check_alike
from .buffer import Buffer
from .chunks import Chunked
from .sinks import SinkTokens
from .state import nest, rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..codecs.base import Codec
    from .base import Slot
    from .state import State


class Layer(Chunked, CacheLayerMixin):
    """Keys and values of one attention layer.

    New tokens go to the tail, in full precision; once attention has seen them, whole blocks leave
    it: they are encoded once, placed once, and never touched again. `update` returns views that a
    kernel reads. With `exact` on the device no block is ever cut, and it returns plain tensors,
    but where a kernel reads these, or sinks before them, faster than torch does.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self, slot: Slot) -> None:
        strategy = slot.strategy
        if slot.sliding_window is not None:
            strategy = strategy.replace(retention=Window(length=slot.sliding_window))
            self.is_sliding = True
        self.slot, self.strategy, self.place, self.stats = slot, strategy, slot.place, slot.stats
        self.cuts_blocks = strategy.codec.cuts_blocks or not strategy.placement.on_device
        first = max(strategy.retention.first, strategy.codec.first if self.cuts_blocks else 0)
        self.sinks = SinkTokens(first, slot.turn) if first else None
        self.padding: Tensor | None = None  # [B] leading padding tokens of each row
        self._forget()

    def _forget(self) -> None:
        self.is_initialized = self.record_past = self.sealing = False
        self._take(self.slot.strategy.codec)
        self.seen = 0
        self._expected = 0  # tokens of the prompt, told before it comes
        self._unseen = 0  # new tokens whose queries are waited for: attention has yet to show them
        self._fetched: dict[str, Tensor] | None = None  # blocks under way to the device

    # --- what transformers calls in a forward pass

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn dtype and device from tokens [B, H, S, D]; reserve what is known to come."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.kernel = self.strategy.kernel.resolve(self.strategy.codec, self.device, self.dtype)
        tail_room, block_room = self._room()
        self.tail = Buffer(OnDevice(), self.device, 16, tail_room)
        # steady: new blocks come while attention still reads what `update` returned
        self.blocks = Buffer(self.place, self.device, 1, block_room, steady=True)
        deepest = 0
        if self.padding is None:
            self.padding = torch.zeros(key_states.shape[0], dtype=torch.long, device=self.device)
        elif self.sinks is not None:
            deepest = int(self.padding.max())
        self._padded = deepest > 0
        self._last_sink = deepest + self.sinks.count if self.sinks is not None else 0
        self.is_initialized = True

    def _room(self) -> tuple[int, int]:
        """Rows of the tail and blocks that are reserved ahead."""
        retention, codec = self.strategy.retention, self.strategy.codec
        room = self.strategy.layout.limit or 0  # columns
        if not self.cuts_blocks and retention.newest is None:  # a prompt may come in pieces
            room = max(room, self._expected)
        if retention.newest is not None:
            room = min(room, retention.first + retention.newest + codec.block)
        if not self.cuts_blocks:
            return room, 0
        first = self.sinks.count if self.sinks is not None else 0
        return min(room, first + codec.tail + codec.block), -(-room // codec.block)

    def resize(self, limit: int) -> None:
        super().resize(limit)
        if self.is_initialized:
            for buffer, rows in zip((self.tail, self.blocks), self._room(), strict=True):
                buffer.resize(rows)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add new tokens and return what their queries attend to.

        Args:
            key_states: [B, H, S, Dk], rotated where the model rotates.
            value_states: [B, H, S, Dv].

        Returns:
            keys [B, H, T, Dk] and values [B, H, T, Dv], T as `get_mask_sizes` announced: tensors,
            or views of what is stored. The S new tokens are in full precision, those before as they
            are stored.

            They stay what they are until the next `update` of this layer, whatever else is done to
            it: attention must have read them by then, and who wants them longer clones them.

            While gradients are recorded, an exact cache on the device keeps the graph of what it
            stores, as DynamicCache does, until `reset`, or until those tokens leave or come to be
            read without gradients; other caches store the numbers alone, and refuse.

        Raises:
            CacheOverflow: a static layout has no room for S more tokens.
            Mismatch: another batch, dtype, device or number of heads than that of the tokens held.
            NoGradient: a cache that passes none, in training mode; in evaluation mode it is the
                backward pass that raises it.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.settle()
        new = key_states, value_states
        S = key_states.shape[-2]
        if held := self.tail.tensors:
            check_alike((held["k"], held["v"]), new)
        self._check_room(S)
        first = self._first_visible()
        graph = None
        if self.cuts_blocks and recorded(*new):
            refuse_training(self.strategy)
            graph, new = new, (key_states.detach(), value_states.detach())
        if self.seen < self._last_sink:
            self.sinks.capture(*new, self.seen, self.padding)
        self.tail.append({"k": new[0], "v": new[1]})
        self.seen += S
        visible = self._visible(first, S, graph)
        self._after_update(S)
        return visible

    def _after_update(self, S: int) -> None:
        """What follows the S newest tokens; attention still reads what `update` returns."""
        if not self.record_past and not self._unseen:
            self._settle()

    def settle(self) -> None:
        if self._unseen:  # attention shows no queries, or nobody has called it
            self._attended(None, None, None)

    def _watch(self, S: int) -> Watch | None:
        n = self._wanted(S)
        if not n:
            return None
        self._unseen = S
        return Watch(self._attended, S, n, self.strategy.retention.log_sum_exp, self.settle)

    def _wanted(self, S: int) -> int:
        """How many queries of S new tokens to wait for: keys that are due are rounded for all."""
        codec = self.strategy.codec
        return S if codec.feedback and not self.record_past and self._due()[1] > 0 else 0

    def _attended(
        self, queries: Tensor | None, log_sum_exp: Tensor | None, scale: float | None
    ) -> None:
        """Settle: attention has shown queries [B, Q, n, D], a call's newest, or, None, will not."""
        if not self._unseen:  # another layer of the model reads the same tokens
            return
        self._unseen = 0
        if not self.record_past:
            self._settle(queries=queries)

    def _moment(self, queries: Tensor) -> Tensor | None:
        """The second moment of queries [B, Q, n, D]; None of too few to say which way they look."""
        H = self.tail.tensors["k"].shape[1]
        if queries.shape[1] // H * queries.shape[2] < queries.shape[3]:
            return None
        if self._padded or self.sinks is None:  # without sinks nobody has looked
            column = torch.arange(self.seen - queries.shape[2], self.seen, device=self.device)
            real = column >= self.padding[:, None]  # [B, n]
            queries = queries.masked_fill(~real[:, None, :, None], 0.0)
        return second_moment(queries, H)

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns `query_length` new tokens will attend to, and the first of them."""
        self._check_room(query_length)
        first = self._first_visible()
        return self.seen - first + query_length, first

    def get_max_length(self) -> int:
        """The reserved length, or the window that slides; -1 without either, as in transformers."""
        retention, limit = self.strategy.retention, self.strategy.layout.limit
        window = None if retention.newest is None else retention.first + retention.newest
        return min((n for n in (limit, window) if n is not None), default=-1)

    def prefetch(self) -> None:
        if self.is_initialized and len(self.blocks):
            self._fetched = self.place.prefetch(self.blocks.read(), self.device)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: not the blocks under way, which may not have arrived."""
        return vars(self) | {"_fetched": None}

    # --- transformers' API

    def expect(self, tokens: int) -> None:
        self._expected = tokens

    def set_padding(self, padding: Tensor) -> None:
        self.padding = padding
        if self.is_initialized:
            self.padding = padding.to(self.device)

    def activate_past_recording(self) -> None:
        """From now on encode and drop nothing until `crop`, so that a rollback leaves no trace.

        Until `deactivate_past_recording` or `reset`; the hook calls the former when assisted
        decoding hands a cache back.
        """
        self.record_past = True

    def deactivate_past_recording(self) -> None:
        """Encode and drop again, beginning with what recording has held back."""
        self.record_past = False
        if self.is_initialized:
            self._settle()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens; settle what recording has held back.

        A crop deeper than the full-precision tail decodes the block it cuts: its tokens return to
        the tail as they were stored.

        Raises:
            ValueError: a positive number (transformers' old meaning).
            Evicted: the tokens that would be visible then have been dropped; call
                `activate_past_recording` first.
        """
        n = removed(tokens_to_remove, self.seen)
        if not self.is_initialized:
            return
        self.check_rollback(n)
        back = self._front() and self.seen - n < self._last_sink
        while len(self.blocks) and (back or n > len(self.tail)):
            self._reopen_last_block()
        if back:
            self._reopen_front()
        self._drop_last(n)
        self._settle()

    def _drop_last(self, n: int) -> None:
        """Forget the newest n tokens, all of them in the tail."""
        self.tail.drop_last(n)
        self.seen -= n
        self._unseen = max(0, self._unseen - n)

    def reset(self) -> None:
        """Forget all tokens and give their memory back."""
        if self.is_initialized:
            self.tail.clear()
            self.blocks.clear()
        if self.sinks is not None:
            self.sinks.clear()
        self.padding = None
        self._forget()

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        self.tail.map(change)
        self.blocks.map(change)
        self.padding = change(self.padding)
        if self.sinks is not None:
            self.sinks.map(change)
        self._fetched = None

    def state(self) -> State:
        self.settle()
        state: State = {"seen": self.seen, "record_past": self.record_past}
        if not self.is_initialized:
            return state | {"padding": self.padding}
        state |= nest("tail", self.tail.read()) | nest("blocks", self.blocks.read())
        return state | nest("sinks", self._first_tokens()) | {"padding": self.padding}

    def load_state(self, state: State) -> None:
        self.reset()
        if state["padding"] is not None:
            self.set_padding(state["padding"].clone())
        if tail := rows(state, "tail"):
            self.lazy_initialization(tail["k"], tail["v"])
            self.tail.load(tail)
            self._load_blocks(rows(state, "blocks"))
            self._load_first_tokens(state, self.device)
        self.seen, self.record_past = state["seen"], state["record_past"]

    # --- encoding, dropping, taking back

    def _take(self, codec: Codec) -> None:
        if codec != self.strategy.codec and self.is_initialized:
            self.kernel = self.strategy.kernel.resolve(codec, self.device, self.dtype)
        super()._take(codec)

    def _settle(self, queries: Tensor | None = None) -> None:
        """Drop what no later query can see, then encode and place the blocks the tail can spare.

        queries: [B, Q, n, D], those of the newest n tokens, where attention has shown them.
        """
        codec = self.strategy.codec
        self._fetched = None  # a copy of blocks as they were
        self._evict()
        front, n = self._due()
        if n > 0:
            rows = self.tail.read(front, front + n * codec.block)
            keys, values = (rows[x].unflatten(2, (n, codec.block)) for x in ("k", "v"))
            if not self.blocks.tensors:
                self._judge(keys)
                codec = self.strategy.codec
            moment = self._moment(queries) if queries is not None and codec.feedback else None
            self.blocks.append(codec.encode(keys, values, moment))
            self.tail.drop_first(front + n * codec.block)
            self.stats.encoded(n, codec.encoder(self.device))
            self.stats.blocks_for_queries += 0 if moment is None else n

    def _due(self) -> tuple[int, int]:
        """How many of the oldest tokens in the tail are first ones, and how many blocks follow that
        it can spare.
        """
        if not self.cuts_blocks:
            return 0, 0
        codec = self.strategy.codec
        # the first tokens leave before the first block does
        front = self.sinks.count if self.sinks is not None and not self._first_stored() else 0
        front -= self._front()
        if front and self.seen < self._last_sink:  # those of some row have not come
            return front, 0
        n = len(self.tail) - front - (0 if self.sealing else codec.tail)
        return front, max(0, n // codec.block)

    def _evict(self) -> None:
        """Drop what no later query can see: whole blocks, then of the tail."""
        if self._first_visible() < self._front():
            return  # some of what `sinks` holds is visible in its own place
        gone = self._first_visible() - self._first_coded()
        if gone > 0:
            block = self.strategy.codec.block
            blocks = min(gone // block, len(self.blocks))
            self.blocks.drop_first(blocks)
            if not len(self.blocks):
                self.tail.drop_first(gone - blocks * block)

    def _reopen_last_block(self) -> None:
        """Decode the newest block back into the front of the tail."""
        rows = self.tail.read()
        block = self.blocks.read(len(self.blocks) - 1)
        keys, values = self.strategy.codec.decode(self.place.fetch(block, self.device))
        self.blocks.drop_last(1)
        opened = {"k": torch.cat((keys.flatten(2, 3).to(self.dtype), rows["k"]), dim=2)}
        opened["v"] = torch.cat((values.flatten(2, 3).to(self.dtype), rows["v"]), dim=2)
        self.tail.clear()
        self.tail.append(opened)

    def _reopen_front(self) -> None:
        """Give the columns before the first block back to the tail, there being no block."""
        opened = {name: self._read(0, self.seen, side) for side, name in enumerate("kv")}
        self.tail.clear()
        self.tail.append(opened)

    def check_rollback(self, n: int) -> None:
        """Raise Evicted where the newest n tokens cannot be taken back."""
        if self._lost(n):
            raise Evicted(
                f"cannot crop {n} of {self.seen} tokens: {self.strategy.retention} has dropped "
                "some that would be visible then; call activate_past_recording() before such "
                "tokens come"
            )

    def _lost(self, n: int) -> bool:
        """Whether tokens that were visible without the newest n have been dropped."""
        return self._first_visible(n) < self._first_stored()

    def _check_room(self, S: int) -> None:
        limit = self.strategy.layout.limit
        if limit is not None and self.seen + S > limit:
            raise CacheOverflow(overflow(limit, self.seen, S))
