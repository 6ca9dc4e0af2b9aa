"""`static`: all room is reserved at the first token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..stage import option
from .base import Layout

if TYPE_CHECKING:
    from ..spec import Strategy


@dataclass(frozen=True)
class Static(Layout):
    """Reserve `max_cache_len` tokens once; one compiled graph serves every length.

    `torch.compile(model, fullgraph=True)` decodes without recompiling. `generate` fills in
    `max_cache_len`, `kvplug.build` takes it as an argument; more tokens raise CacheOverflow.
    Compiled decoding needs full+device, exact or coded. With `window`, `sinks`, `host` or `disk`
    room is reserved all the same, but lengths are Python integers and the cache says
    `is_compileable = False`.
    """

    name: ClassVar[str] = "static"
    max_cache_len: int | None = option(None, "most tokens of a sequence, prompt included", ge=1)

    @property
    def limit(self) -> int | None:
        return self.max_cache_len

    def is_compileable(self, strategy: Strategy) -> bool:
        return strategy.retention.newest is None and strategy.placement.name == "device"
