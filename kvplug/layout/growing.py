"""`growing`: room grows geometrically."""

from dataclasses import dataclass
from typing import ClassVar

from .base import Layout


@dataclass(frozen=True)
class Growing(Layout):
    """Reserve an eighth ahead and append in place: no concatenation per token, as DynamicCache does."""

    name: ClassVar[str] = "growing"
