"""What a store did, counted; and what went wrong, logged once."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger("kvplug")

# name -> what it counts: the lines of `Store.stats()`, and of Prometheus
COUNTERS = {
    "hits": "chunks loaded",
    "reused_tokens": "tokens that were loaded instead of computed",
    "saved": "chunks written",
    "evicted": "chunks dropped for others",
    "bytes_read": "bytes of records loaded",
    "bytes_written": "bytes of records written",
    "load_seconds": "seconds the back end took to load",
    "verify_seconds": "seconds it took to check and unpack what was loaded",
    "save_seconds": "seconds it took to pack and write",
}
# the same, by reason
REASONED = {
    "misses": "chunks asked for and not loaded",
    "unsaved": "chunks that could not be written",
    "fallbacks": "calls that a store does not serve",
}


class Metrics:
    """Counters of one store, shared by threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self._reasons: dict[str, Counter[str]] = defaultdict(Counter)
        self._said: set[tuple[str, str]] = set()

    def count(self, name: str, n: float = 1, reason: str | None = None) -> None:
        """Add `n` to a counter; those of REASONED want a reason, the others have none.

        Raises KeyError for a name that is neither, or a reason where there is none or the reverse.
        """
        if (name in REASONED) != (reason is not None):
            raise KeyError(f"{name!r} with reason {reason!r}: {list(COUNTERS)}, {list(REASONED)}")
        with self._lock:
            if reason is None:
                self._counts[name] += n
            else:
                self._reasons[name][reason] += n

    @contextmanager
    def seconds(self, name: str) -> Iterator[None]:
        """Add the time that the body takes to a counter."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.count(name, time.perf_counter() - began)

    def say(self, what: str, reason: str, text: str) -> None:
        """Log `text` as a warning, the first time for this `what` and `reason`."""
        with self._lock:
            new = (what, reason) not in self._said
            self._said.add((what, reason))
        if new:
            logger.warning("kvplug: %s", text)

    def as_dict(self) -> dict:
        """A copy in plain types, for JSON."""
        with self._lock:
            return self._counts | {name: dict(self._reasons[name]) for name in REASONED}
