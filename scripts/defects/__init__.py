"""Defects that the tests must notice, for `scripts/mutate.py`.

Where a file has changed so that a text is gone, the defect is written anew in its words; where it
can no longer be made, another one of its kind takes its place.
"""

from . import encoded, held, outlive, read
from .defect import Defect

DEFECTS = [*held.DEFECTS, *encoded.DEFECTS, *read.DEFECTS, *outlive.DEFECTS]

__all__ = ["DEFECTS", "Defect"]
