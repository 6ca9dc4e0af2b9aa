"""A layer in pieces: what one chunk of a prompt after the other adds, to be joined again later."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .columns import Columns
from .state import NOW, nest, rows

if TYPE_CHECKING:
    from torch import Tensor

    from .state import State


class Chunked(Columns):
    """`Columns` that give what each chunk of a prompt adds, and take it."""

    by_chunks = True

    def seal(self) -> None:
        self.settle()
        self._settle()

    @property
    def before_blocks(self) -> int:
        return self.sinks.count if self.cuts_blocks and self.sinks is not None else 0

    def chunk(self, begin: int, end: int) -> dict[str, Tensor]:
        window, block, F = self.strategy.retention.newest, self.strategy.codec.block, self._front()
        sinks = nest("sinks", self._first_tokens()) if F else {}
        tail = {f"{NOW}{name}": x for name, x in nest("tail", self.tail.read()).items()}
        if window is not None and window <= end - begin:  # some have left it already
            held = sinks | nest("blocks", self.blocks.read())
            return tail | {f"{NOW}{name}": x for name, x in held.items()}
        if self.cuts_blocks:
            n = (end - F) // block - max(0, begin - F) // block
            new = nest("blocks", self.blocks.read(len(self.blocks) - n))
            return tail | new | (sinks if begin == 0 else {})
        # as blocks, as elsewhere; before them what fills none
        rows, start = self.tail.read(len(self.tail) - (end - begin)), (end - begin) % block
        first = {name: x[:, :, :start] for name, x in rows.items()}
        keys, values = (rows[name][:, :, start:].unflatten(2, (-1, block)) for name in "kv")
        return nest("tail", first) | nest("blocks", self.strategy.codec.encode(keys, values))

    def load_chunks(self, chunks: dict[str, Tensor], end: int, device: torch.device) -> None:
        whole = {name.removeprefix(NOW): x for name, x in chunks.items()}
        tail = {name: x.to(device) for name, x in rows(whole, "tail").items()}
        self.lazy_initialization(tail["k"], tail["v"])
        blocks = rows(whole, "blocks")
        if not self.cuts_blocks and blocks:
            pair = zip("kv", self.strategy.codec.decode(blocks), strict=True)
            after, blocks = {name: x.flatten(2, 3).to(device) for name, x in pair}, {}
            if tail["k"].shape[2]:
                after = {name: torch.cat((tail[name], x), 2) for name, x in after.items()}
            tail = after
        self.tail.load(tail)
        self._load_blocks(blocks)
        self._load_first_tokens(whole, device)
        self.seen = end
        self._evict()

    def _load_blocks(self, blocks: dict[str, Tensor]) -> None:
        if blocks:
            self._take(self.slot.strategy.codec.that_made(blocks))
        self.blocks.load(blocks)

    def _first_tokens(self) -> dict[str, Tensor | None]:
        return {} if self.sinks is None else {"k": self.sinks.keys, "v": self.sinks.values}

    def _load_first_tokens(self, state: State, device: torch.device) -> None:
        for name, x in rows(state, "sinks").items():
            setattr(self.sinks, {"k": "keys", "v": "values"}[name], x.to(device, copy=True))
