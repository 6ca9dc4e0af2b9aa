"""What a cache did: which kernel ran, and how often a view had to become a dense tensor."""

from __future__ import annotations

import logging
from collections import Counter

logger = logging.getLogger("kvplug")


class Stats:
    """Counters of one cache, shared by its layers."""

    def __init__(self) -> None:
        self.kernels: Counter[str] = Counter()
        self.materialised: Counter[str] = Counter()
        self.blocks_encoded = 0

    def materialise(self, reason: str) -> None:
        """Count one dense copy of a layer's keys or values; say so once per reason."""
        if not self.materialised[reason]:
            logger.warning(
                "kvplug: %s reads the cache as a dense tensor: correct, but slow and large; "
                "attn_implementation='sdpa' reads it as stored",
                reason,
            )
        self.materialised[reason] += 1

    def as_dict(self) -> dict:
        """A copy in plain types, for JSON."""
        return {
            "kernels": dict(self.kernels),
            "materialised": dict(self.materialised),
            "blocks_encoded": self.blocks_encoded,
        }
