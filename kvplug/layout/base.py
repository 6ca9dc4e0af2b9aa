"""The contract of a layout: how much room is reserved ahead."""

from dataclasses import dataclass
from typing import ClassVar

from ..stage import Stage


@dataclass(frozen=True)
class Layout(Stage):
    """How a layer reserves room for its tokens."""

    kind: ClassVar[str] = "layout"

    @property
    def limit(self) -> int | None:
        """Most tokens a sequence may have; None: no limit, nothing reserved ahead."""
        return None
