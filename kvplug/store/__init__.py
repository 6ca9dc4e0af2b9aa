"""Chunks of caches that outlive a call: what names them, what proves them, what keeps them.

`store.py` is the whole as callers see it; `keys.py` names a chunk by the model and the tokens that
made it, `record.py` turns it into bytes that prove themselves, `backend.py` says what keeps bytes.
"""

from . import keys
from .backend import Backend, Entry, Full
from .behind import behind
from .store import Store, open

__all__ = ["Backend", "Entry", "Full", "Store", "behind", "keys", "open"]
