"""`window`: the newest tokens."""

from dataclasses import dataclass
from typing import ClassVar

from ..stage import option
from .base import Retention


@dataclass(frozen=True)
class Window(Retention):
    """Keep the newest `length` tokens, the one that asks included (sliding-window attention,
    arXiv:2004.05150).

    Counted like transformers' `sliding_window`. A forward of several tokens sees all of them and
    the window before.
    """

    name: ClassVar[str] = "window"
    length: int = option(4096, "tokens that a query sees, itself included", ge=1)

    @property
    def newest(self) -> int:
        return self.length
