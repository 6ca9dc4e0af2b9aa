"""Sizes of memory as people write them."""

from __future__ import annotations

import re

from .errors import SpecError

UNITS = {
    "B": 1,
    **{f"{prefix}iB": 1024**i for i, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}B": 1000**i for i, prefix in enumerate("KMGT", 1)},
}
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
EXACT_NAMES = {name.lower(): name for name in UNITS}


def bytes_of(size: int | str) -> int:
    """`"1.5GiB"` -> 1610612736; a number is bytes already.

    Raises SpecError for what is no size, or none above zero.
    """
    found = SIZE.fullmatch(size) if isinstance(size, str) else None
    if isinstance(size, int) and not isinstance(size, bool):
        number = size
    elif found and (found[2] or "B").lower() in EXACT_NAMES:
        number = int(float(found[1]) * UNITS[EXACT_NAMES[(found[2] or "B").lower()]])
    else:
        raise SpecError(
            f"{size!r} is no size of memory: write a number of bytes, or one with a unit of "
            f"{', '.join(UNITS)}, as in '4GiB'"
        )
    if number < 1:
        raise SpecError(f"{size!r}: a size of memory is at least one byte")
    return number


def text_of(number: int) -> str:
    """1610612736 -> `"1.5 GiB"`."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if number >= UNITS[unit]:
            return f"{number / UNITS[unit]:.1f} {unit}"
    return f"{number} B"
