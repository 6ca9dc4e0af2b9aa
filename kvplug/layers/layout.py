"""How room for tokens is reserved: the contract of a layout, and `growing` and `static`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import SpecError
from ..retention.base import Scored
from ..stage import Stage, option
from .growing import Layer
from .ragged import RaggedLayer
from .scored import ScoredLayer
from .static import StaticLayer
from .static_coded import StaticCodedLayer
from .static_sliding import StaticSlidingLayer

if TYPE_CHECKING:
    from ..spec import Strategy
    from .base import AttentionLayer, Slot


@dataclass(frozen=True)
class Layout(Stage):
    """How a layer reserves room for its tokens, and with that the class that holds them."""

    kind: ClassVar[str] = "layout"
    reserves: ClassVar[bool] = False  # room for `limit` tokens, which must then be told

    @property
    def limit(self) -> int | None:
        """Most tokens a sequence may have; None: no limit, nothing reserved ahead."""
        return None

    def resolve(self, max_cache_len: int | None) -> Layout:
        """The layout of a call that may reach so many tokens; None: nobody says.

        Raises SpecError where it must know.
        """
        return self

    def is_compileable(self, strategy: Strategy) -> bool:
        """Whether a decode step of `strategy` is one compiled graph for all lengths."""
        return False

    def layer(self, slot: Slot) -> type[AttentionLayer]:
        """The class of a layer, which is built by `cls(slot)`; `slot.strategy.layout` is self."""
        if slot.sliding_window is not None or not isinstance(slot.strategy.retention, Scored):
            return Layer
        return ScoredLayer if slot.budgets is None else RaggedLayer


@dataclass(frozen=True)
class Growing(Layout):
    """Reserve an eighth ahead and append in place; DynamicCache concatenates at each token."""

    name: ClassVar[str] = "growing"


@dataclass(frozen=True)
class Static(Layout):
    """Reserve `max_cache_len` tokens once; one compiled graph serves every length.

    `torch.compile(model, fullgraph=True)` decodes without recompiling. `generate` fills in
    `max_cache_len`, `kvplug.build` takes it as an argument; more tokens raise CacheOverflow.

    A length that `generate` has filled in may grow: a later call that is given the cache and needs
    more room moves it to a larger one before the model runs, and a compiled step is compiled once
    more, since addresses and shapes are new. A `max_cache_len` of yours, wherever you said it,
    holds: such a call raises CacheOverflow, which says the length; `Cache.grow` changes it.

    Compiled decoding needs full+device, exact or coded. With `window`, `sinks`, `host` or `disk`
    room is reserved all the same, but lengths are Python integers and the cache says
    `is_compileable = False`.
    """

    name: ClassVar[str] = "static"
    reserves: ClassVar[bool] = True
    max_cache_len: int | None = option(None, "most tokens of a sequence, prompt included", ge=1)

    @property
    def limit(self) -> int | None:
        return self.max_cache_len

    def resolve(self, max_cache_len: int | None) -> Layout:
        if self.limit is not None:
            return self
        if max_cache_len is None:
            raise SpecError("'static' needs max_cache_len, as an argument of build or of the spec")
        return dataclasses.replace(self, max_cache_len=max_cache_len)

    def is_compileable(self, strategy: Strategy) -> bool:
        return strategy.retention.newest is None and strategy.placement.on_device

    def layer(self, slot: Slot) -> type[AttentionLayer]:
        strategy = slot.strategy
        if not self.is_compileable(strategy):
            return super().layer(slot)
        if slot.sliding_window is not None:  # windows stay in full precision
            return StaticSlidingLayer
        return StaticCodedLayer if slot.coded else StaticLayer
