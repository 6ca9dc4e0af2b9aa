"""Several things timed in one loop, in alternating order, so that a machine that drifts slows all
of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from evals.schema import measured

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from evals.strategies import Strategy

Laps = list[list[float]] | Exception  # samples of each round, or what ended it


def race(
    entrants: Mapping[Strategy, Callable[[], list[float]]], rounds: int, tick: Callable[[], None]
) -> dict[Strategy, Laps]:
    """Have every entrant give samples once a round: A B C, C B A, A B C, ...

    One that raises is out; the others go on.
    """
    laps: dict[Strategy, Laps] = {strategy: [] for strategy in entrants}
    for number in range(rounds):
        for strategy in list(laps) if number % 2 == 0 else list(reversed(laps)):
            if isinstance(laps[strategy], Exception):
                continue
            try:
                laps[strategy].append(entrants[strategy]())
            except Exception as error:  # its row says so; frames would keep its tensors alive
                laps[strategy] = error.with_traceback(None)
            tick()
    return laps


def pooled(laps: list[list[float]]) -> list[float]:
    """Return the samples of all rounds."""
    return [sample for lap in laps for sample in lap]


def speedup(own: list[list[float]], reference: Laps) -> dict[str, Any] | None:
    """Return the row that says how many times as fast as the reference: one sample per round."""
    if isinstance(reference, Exception):
        return None
    ratios = [np.median(r) / np.median(o) for o, r in zip(own, reference, strict=True)]
    return measured("speedup", *ratios, note="one sample per round, of the medians in that round")
