"""What a layer stores, by column, and reading it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..attention.gradients import recorded, refuse
from ..attention.stored import Stored, placed
from ..attention.view import Watch, views
from .base import AttentionLayer

if TYPE_CHECKING:
    from torch import Tensor

    from ..codecs.base import Encoded
    from ..kernels.base import Kernel
    from ..placement.base import Place
    from ..stats import Stats
    from .buffer import Buffer


class Columns(AttentionLayer):
    """Tokens in blocks and in a tail, addressed by the column at which they came.

    Columns count tokens from the start of the sequence, padding included:

        column   0 ................................................................ seen
                 |  evicted  |  sinks  |  blocks  |  tail  |  new  |
                             ^ first visible              ^ seen, before `update`

    What is stored is blocks, then tail; what a query may see is a suffix of the columns, so that
    the mask transformers builds for a suffix is right whatever retention drops. Sinks, the first
    tokens of a row, which retention or the codec keeps, are read in the place of the oldest visible
    ones: of those that retention has dropped, or, before it drops any, of the columns before the
    first block. There a row that is padded has them instead of padding, and the layer says itself
    what is visible.

    blocks: a `Buffer` of encoded tensors [B, H, N, ...]; tail: one of keys and values [B, H, R, D]
    padding: [B] leading padding tokens of each row
    """

    place: Place
    kernel: Kernel
    stats: Stats
    blocks: Buffer
    tail: Buffer
    padding: Tensor | None
    seen: int
    is_initialized: bool
    _padded: bool  # whether a row has padding
    _last_sink: int  # columns after which all rows have shown their sinks
    _fetched: Encoded | None  # blocks under way to the device

    def held(self) -> int:
        return self.seen - self._first_visible()

    def encoded(self) -> tuple[int, int, Encoded | None]:
        if not self.is_initialized:
            return 0, 0, None
        self.settle()
        blocks = self.blocks.read() if len(self.blocks) else None
        return self._first_coded(), self._tail_start(), blocks

    @property
    def keys(self) -> Tensor | None:
        """The keys a next query can see, dense [B, H, T, Dk], a copy; None before any token."""
        return self._dense(0) if self.seen else None

    @property
    def values(self) -> Tensor | None:
        """The values a next query can see, dense [B, H, T, Dv], a copy; None before any token."""
        return self._dense(1) if self.seen else None

    def _dense(self, side: int) -> Tensor:
        self.settle()
        first = self._first_visible()
        if not self._has_sinks(first):
            return self._read(first, self.seen, side).clone()
        start = first + self.strategy.retention.first
        return torch.cat((self._sinks_at(first)[side], self._read(start, self.seen, side)), dim=2)

    def _tail_start(self) -> int:
        """The column of the oldest token in the tail."""
        return self.seen - len(self.tail)

    def _first_coded(self) -> int:
        """The oldest column in a block, or in the tail where there is none."""
        return self._tail_start() - len(self.blocks) * self.strategy.codec.block

    def _front(self) -> int:
        """How many columns from the first one on are held by `sinks` alone."""
        sinks = self.sinks
        if sinks is None or sinks.keys is None or self.seen < self._last_sink:
            return 0
        return sinks.count if self._first_coded() == sinks.count else 0

    def _first_stored(self) -> int:
        """The oldest column still stored."""
        return 0 if self._front() else self._first_coded()

    def _first_visible(self, n: int = 0) -> int:
        """The oldest column that the next query can see; were the newest n tokens removed."""
        retention = self.strategy.retention
        if retention.newest is None:
            return 0
        return max(0, self.seen - n - (retention.newest - 1) - retention.first)

    def _has_sinks(self, first: int) -> bool:
        """Whether sinks stand at the columns `first` and on, in the place of what was dropped."""
        return first > 0 and self.strategy.retention.first > 0

    def _sinks_at(self, first: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, count, D] of the sinks, as they stand from column `first` on."""
        last = first + self.strategy.retention.first

        def own() -> tuple[Tensor, Tensor]:
            return self._read(first, last, 0), self._read(first, last, 1)

        return self.sinks.at(first, self.strategy.retention.first, self.padding, own)

    def _visible(
        self, first: int, S: int, graph: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values from column `first` on, sinks in their place.

        graph: the new tokens, where autograd records them and what is stored passes no gradient.
        """
        head, start, starts = None, first, None
        visible = self._visible_columns()
        if self._has_sinks(first):
            head, start = self._sinks_at(first), first + self.strategy.retention.first
        if start < (front := self._front()):
            own = self.sinks.keys, self.sinks.values
            if start:
                own = tuple(self._own_front(side)[:, :, start:] for side in (0, 1))
            elif self._padded:
                starts, visible = self.padding, self._beside_sinks(self.seen - S)
            both = zip(head, own, strict=True) if head else ()
            head = tuple(torch.cat(pair, dim=2) for pair in both) or own
            start = front
        blocks, skip = self._blocks_from(start)
        rows = self.tail.read(max(0, start - self._tail_start()))
        tail = rows["k"], rows["v"]
        if graph is not None:
            tail = refuse(self.strategy, graph, tail)
        watch = self._watch(S)
        stored = Stored(
            self.strategy.codec, head, blocks, skip, tail, new=S, visible=visible, starts=starts
        )
        if blocks or watch or self._kernel_reads(S, stored):
            return views(stored, self.kernel, self.stats, watch)
        return stored.dense()

    def _visible_columns(self) -> Tensor | None:
        """Which columns before the new ones a query may see, [B, H, T]; None: as the mask says."""
        return None

    def _beside_sinks(self, T: int) -> Tensor:
        """Of columns 0 to T: the sinks, and what comes after them in each row, [B, 1, T]."""
        column, F = torch.arange(T, device=self.device), self.sinks.count
        return ((column < F) | (column >= F + self.padding[:, None]))[:, None]

    def _own_front(self, side: int) -> Tensor:
        """Keys or values [B, H, F, D] of the columns before the first block, as they came."""
        first = (self.sinks.keys, self.sinks.values)[side]
        return placed(first, torch.zeros_like(first), 0, self.padding)

    def _watch(self, S: int) -> Watch | None:
        """Who wants to see the queries of S new tokens."""
        return None

    def _kernel_reads(self, S: int, stored: Stored) -> bool:
        """Whether to show tokens that are all as they came by a view, rather than as tensors."""
        if recorded(*stored.tail) or torch.compiler.is_compiling():
            return False  # real tensors for autograd and for the compiler
        if not stored.is_plain:
            return self.kernel.reads_sinks(S, stored.length)
        if self.kernel.formats is not None and self.device.type == "cpu" and 1 < S < stored.length:
            # beside a mask transformers repeats heads, a copy of all; a view has them shared. Not
            # with `reference`, which is chosen where attention wants tensors
            return True
        return self.kernel.reads_plain(S, stored.length)

    def _read(self, begin: int, end: int, side: int) -> Tensor:
        """Columns begin:end of keys (0) or values (1), decoded, without sinks: [B, H, n, D]."""
        front = self._front()
        coded = max(begin, front)
        blocks, skip = self._blocks_from(coded, end)
        tail_start = self._tail_start()
        tail = self.tail.read(max(0, coded - tail_start), max(0, end - tail_start))
        stored = Stored(self.strategy.codec, None, blocks, skip, (tail["k"], tail["v"]))
        read = stored.side(side)
        if begin < front:
            read = torch.cat((self._own_front(side)[:, :, begin:], read), dim=2)
            if self._padded:
                first = (self.sinks.keys, self.sinks.values)[side]
                read = placed(first, read, begin, self.padding)
        return read[:, :, : end - begin]

    def _blocks_from(self, column: int, end: int | None = None) -> tuple[dict[str, Tensor], int]:
        """Blocks, on the device, from the one with `column` on; how many of its tokens precede.

        end: the first column that is not wanted; None: all blocks, which may be under way.
        """
        if column >= self._tail_start():
            return {}, 0
        block = self.strategy.codec.block
        n, skip = divmod(column - self._first_coded(), block)
        if end is not None:
            last = -((self._first_coded() - end) // block)  # rounded up
            blocks = self.blocks.read(n, min(last, len(self.blocks)))
        elif self._fetched is None:
            blocks = self.blocks.read(n)
        else:
            blocks, self._fetched = {k: x[:, :, n:] for k, x in self._fetched.items()}, None
        return self.place.fetch(blocks, self.device), skip
