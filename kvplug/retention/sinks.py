"""`sinks`: the first tokens and the newest ones."""

from dataclasses import dataclass
from typing import ClassVar

from ..stage import option
from .base import Retention


@dataclass(frozen=True)
class Sinks(Retention):
    """Keep the first `sinks` tokens and the newest `window` (StreamingLLM, arXiv:2309.17453).

    As in the paper, positions are those inside the cache. The sinks are rotated to stand right
    before the window: a model never meets a distance beyond `sinks + window`, and generation has
    no end. Departure from the paper: the window is not rotated (distances inside it do not change),
    only the sinks are, on each step and from their original, so that no error adds up. Layers
    without rotary positions keep their own.
    """

    name: ClassVar[str] = "sinks"
    sinks: int = option(4, "first tokens of every sequence that stay", ge=1)
    window: int = option(1020, "newest tokens that a query sees, itself included", ge=1)

    @property
    def first(self) -> int:
        return self.sinks

    @property
    def newest(self) -> int:
        return self.window
