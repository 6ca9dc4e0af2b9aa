"""Several things timed in one loop, in alternating order, so that a machine that drifts slows all
of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from evals.rows.schema import measured

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from evals.setup.contenders import Contender

Rounds = list[list[float]] | Exception  # samples of each round, or what ended it


def interleave(
    runners: Mapping[Contender, Callable[[], list[float]]], count: int, tick: Callable[[], None]
) -> dict[Contender, Rounds]:
    """Have every runner give samples once a round: A B C, C B A, A B C, ...

    One that raises is out; the others go on.
    """
    rounds: dict[Contender, Rounds] = {contender: [] for contender in runners}
    for number in range(count):
        for contender in list(rounds) if number % 2 == 0 else list(reversed(rounds)):
            own = rounds[contender]
            if isinstance(own, Exception):
                continue
            try:
                own.append(runners[contender]())
            except Exception as error:  # its row says so; frames would keep its tensors alive
                rounds[contender] = error.with_traceback(None)
            tick()
    return rounds


def pooled(rounds: list[list[float]]) -> list[float]:
    """Return the samples of all rounds."""
    return [sample for one in rounds for sample in one]


def speedup(own: list[list[float]], reference: Rounds) -> dict[str, Any] | None:
    """Return the row that says how many times as fast as the reference: one sample per round."""
    if isinstance(reference, Exception):
        return None
    ratios = [np.median(r) / np.median(o) for o, r in zip(own, reference, strict=True)]
    return measured("speedup", *ratios, note="one sample per round, of the medians in that round")
