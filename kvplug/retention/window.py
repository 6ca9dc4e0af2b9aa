"""`window`: the newest tokens."""

from dataclasses import dataclass
from typing import ClassVar

from ..stage import option
from .base import Retention


@dataclass(frozen=True)
class Window(Retention):
    """Keep the newest `length` tokens, the one that asks included.

    Sliding-window attention (arXiv:2004.05150), counted like transformers' `sliding_window`. The
    tokens of one forward pass all see each other and the window before the first of them.
    """

    name: ClassVar[str] = "window"
    length: int = option(4096, "tokens that a query sees, itself included", ge=1)

    @property
    def newest(self) -> int:
        return self.length
