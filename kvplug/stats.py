"""What a cache did: which kernel ran, and how often a view had to become a dense tensor."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .codecs.base import Codec
    from .retention.base import Retention

logger = logging.getLogger("kvplug")


class Stats:
    """Counters of one cache, shared by its layers."""

    def __init__(self) -> None:
        self.kernels: Counter[str] = Counter()
        self.encoders: Counter[str] = Counter()  # blocks that each has encoded
        self.materialised: Counter[str] = Counter()
        self.blocks_for_queries = 0  # of these: keys rounded for the queries that attention showed
        self.swinging = False  # whether keys of some layer have swung: `codecs/guard.py`
        self.other_questions = 0  # prompts given to what had been chosen for an earlier one

    def materialise(self, reason: str) -> None:
        """Count one dense copy of a layer's keys or values; say so once per reason."""
        if not self.materialised[reason]:
            logger.warning(
                "kvplug: %s reads the cache as a dense tensor: correct, but slow and large; "
                "attn_implementation='sdpa' reads it as stored",
                reason,
            )
        self.materialised[reason] += 1

    @property
    def blocks_encoded(self) -> int:
        """By all encoders together."""
        return self.encoders.total()

    def encoded(self, blocks: int, encoder: str) -> None:
        """Count blocks, and what has encoded them."""
        self.encoders[encoder] += blocks

    def swing(self, codec: Codec, given: Codec) -> None:
        """Say once that keys of a layer swing, and by what they are encoded."""
        if not self.swinging:
            logger.warning(
                "kvplug: keys of this model swing within a block, as a large bias that positions "
                "turn makes them, and may lose more than those of other models: such layers get "
                "%s (%s was asked for); strict=True refuses",
                codec,
                given,
            )
        self.swinging = True

    def ask_again(self, retention: Retention) -> None:
        """Count a prompt for which retention did not choose what is held; say so once."""
        if not self.other_questions:
            logger.warning(
                "kvplug: %s has kept what an earlier prompt asked for, and this cache is given "
                "another: what that asks for may be gone; a new cache sees the whole text again",
                retention,
            )
        self.other_questions += 1

    def as_dict(self) -> dict:
        """A copy in plain types, for JSON."""
        return {
            "kernels": dict(self.kernels),
            "encoders": dict(self.encoders),
            "materialised": dict(self.materialised),
            "blocks_encoded": self.blocks_encoded,
            "blocks_for_queries": self.blocks_for_queries,
            "swinging": self.swinging,
            "other_questions": self.other_questions,
        }
