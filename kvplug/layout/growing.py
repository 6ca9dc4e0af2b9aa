"""`growing`: room grows geometrically."""

from dataclasses import dataclass
from typing import ClassVar

from .base import Layout


@dataclass(frozen=True)
class Growing(Layout):
    """Reserve an eighth ahead and append in place; DynamicCache concatenates at each token."""

    name: ClassVar[str] = "growing"
