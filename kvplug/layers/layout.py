"""The contract of a layout: how much room is reserved ahead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..stage import Stage

if TYPE_CHECKING:
    from ..spec import Strategy


@dataclass(frozen=True)
class Layout(Stage):
    """How a layer reserves room for its tokens."""

    kind: ClassVar[str] = "layout"

    @property
    def limit(self) -> int | None:
        """Most tokens a sequence may have; None: no limit, nothing reserved ahead."""
        return None

    def is_compileable(self, strategy: Strategy) -> bool:
        """Whether a decode step of `strategy` is one compiled graph for all lengths."""
        return False
