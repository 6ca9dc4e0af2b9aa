"""A defect that the tests must notice: a text, and what replaces it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Defect:
    """What is planted, and the arguments of pytest that should turn red."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
