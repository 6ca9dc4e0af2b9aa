"""`full`: nothing is dropped."""

from dataclasses import dataclass
from typing import ClassVar

from .base import Retention


@dataclass(frozen=True)
class Full(Retention):
    """Keep every token."""

    name: ClassVar[str] = "full"
