"""What all layers of ours have in common, and what each is built from."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from ..errors import SpecError
from .batch import RowOperations

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..codecs.base import Codec, Encoded
    from ..placement.base import Place
    from ..spec import Strategy
    from ..stats import Stats
    from .rotation import Turn
    from .sinks import SinkTokens
    from .state import State


@dataclass(frozen=True)
class Slot:
    """The place of one attention layer in a model, and what its cache layer is built from.

    strategy: as it holds for this layer
    place, stats: the cache's own, shared by its layers
    sliding_window: that of the model's own attention here; None: full attention
    turn: how the model turns what is stored here, where first tokens must be turned further
    budgets: tokens that each stored head keeps, where these are unlike; None: all keep as many
    coded: whether some layer of the cache is: static ones then all say the same of their columns
    """

    strategy: Strategy
    place: Place
    stats: Stats
    sliding_window: int | None = None
    turn: Turn | None = None
    budgets: tuple[int, ...] | None = None
    coded: bool = False


class AttentionLayer(RowOperations):
    """A layer of ours: what a cache and its tests ask beside transformers' own methods."""

    is_croppable = True
    cuts_blocks = False  # whether tokens are encoded at all
    sinks: SinkTokens | None = None
    evictions = 0  # how often a method has chosen anew among the tokens held

    slot: Slot
    strategy: Strategy

    def state(self) -> State:
        """All that is held, as named tensors and numbers; blocks as they are encoded."""
        raise SpecError(
            f"{type(self).__name__}, the layer of {self.strategy}, has no state() and no "
            "load_state(): it can be neither copied nor saved"
        )

    def load_state(self, state: State) -> None:
        """Hold what a layer built alike has held, copied, on the device of its tensors."""
        raise NotImplementedError

    def settle(self) -> None:
        """Encode and drop now what waits for attention to show its queries."""

    # --- prefixes: what one chunk of a prompt after the other adds, to be joined again later

    by_chunks = False  # whether the four below are there
    sealing = False  # whether the newest tokens are encoded too, as those of a chunk are

    @property
    def before_blocks(self) -> int:
        """Columns before the first block: as many as the first chunk is longer."""
        return 0

    def seal(self) -> None:
        """While `sealing`: encode what still waits; attention must have seen all of it."""

    def chunk(self, begin: int, end: int) -> dict[str, Tensor]:
        """What columns begin:end, the newest of a sealed layer, add to those before; as `join`."""
        raise NotImplementedError

    def load_chunks(self, chunks: dict[str, Tensor], end: int, device: torch.device) -> None:
        """Hold `end` columns of chunks that `join` has put together, copied; it was empty."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict) -> Self:
        twin = memo[id(self)] = self._blank(copy.deepcopy(self.slot, memo))
        twin.load_state(self.state())
        return twin

    def _blank(self, slot: Slot) -> Self:
        """A layer built alike, empty."""
        return type(self)(slot)

    def held(self) -> int:
        """Tokens that the next query can see, itself not counted."""
        raise NotImplementedError

    def resize(self, limit: int) -> None:
        """Have room for `limit` tokens, no fewer than are held, where a layout limits them."""
        whole = self.slot.strategy.with_room(limit)
        self.slot = dataclasses.replace(self.slot, strategy=whole)  # what copies are built from
        self.strategy = self.strategy.with_room(limit)

    def codecs(self) -> set[Codec]:
        """What encodes: one codec, or of a layer in groups of heads each group's."""
        return {self.strategy.codec}

    def _judge(self, keys: Tensor) -> None:
        """Take the codec that serves first blocks with such keys [B, H, N, block, Dk]."""
        own = self.slot.strategy.codec
        if not own.hostile(keys):
            self._take(own)
            return
        self._take(own.for_hostile())
        self.slot.stats.swing(self.strategy.codec, own)

    def _take(self, codec: Codec) -> None:
        """Encode by this one, the layer's own or what that has for hostile keys, from the first
        block on.
        """
        if codec != self.strategy.codec:
            self.strategy = self.strategy.replace(codec=codec)
            if codec != self.slot.strategy.codec:
                self.slot.stats.swing(codec, self.slot.strategy.codec)

    def encoded(self) -> tuple[int, int, Encoded | None]:
        """The first column that lies in a block, the first after these, and the blocks."""
        return 0, 0, None

    def set_padding(self, padding: Tensor) -> None:
        """Leading padding tokens of each row, [B] int, told before the first token."""

    def kept(self) -> list[int] | None:
        """Tokens that each head holds, where retention chooses per head; else None."""

    def asked(self) -> list[int] | None:
        """Tokens that each head is to keep, where retention chooses per head; else None."""

    def expect(self, tokens: int) -> None:
        """The prompt ends after `tokens` columns: room may be made for it, and what is kept for its
        end waits until then.
        """

    def prefetch(self) -> None:
        """Start bringing blocks to the device, where the placement can do so without waiting."""


def removed(tokens_to_remove: int, seen: int) -> int:
    """How many of the tokens seen a `crop` removes: transformers says it with a minus sign.

    It may be a tensor: transformers 5.17 passes one in assisted decoding.
    """
    tokens_to_remove = int(tokens_to_remove)
    if tokens_to_remove > 0:
        raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
    return min(-tokens_to_remove, seen)


def overflow(limit: int, seen: int, S: int) -> str:
    """The text of CacheOverflow."""
    return (
        f"static cache of max_cache_len={limit} holds {seen} tokens and cannot take {S} more; "
        f"build it with max_cache_len >= {seen + S}, or let it grow({seen + S})"
    )
