"""`paged`: room that grows by the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvplug import Layer, Layout, option

if TYPE_CHECKING:
    from torch import Tensor

    from kvplug import Slot


@dataclass(frozen=True)
class Paged(Layout):
    """Reserve at least `page` tokens whenever room runs out: memory moves less often."""

    name: ClassVar[str] = "paged"
    page: int = option(512, "tokens reserved at a time", ge=1)

    def layer(self, slot: Slot) -> type[Layer]:
        return PagedLayer


class PagedLayer(Layer):
    """`Layer`, whose tail grows by the page."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.tail.unit = self.strategy.layout.page
