"""Seconds that layers spend on choosing what to keep, inside a forward pass."""

from __future__ import annotations

import functools
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from evals.measure.clock import wait
from kvplug.layers.scored import ScoredLayer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

# from queries shown to tokens gone, whichever comes first; where a codec encodes, that too
METHODS = ("_attended", "_settle")


class Spent:
    """Seconds so far."""

    def __init__(self) -> None:
        self.seconds = 0.0


@contextmanager
def clocked(device: torch.device) -> Iterator[Spent]:
    """Count what all layers that choose spend on it, as long as the context lasts."""
    spent, inside = Spent(), []

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            if inside:
                return method(*args, **kwargs)
            inside.append(True)
            wait(device)
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                wait(device)
                spent.seconds += time.perf_counter() - start
                inside.clear()

        return run

    originals = {name: vars(ScoredLayer)[name] for name in METHODS}
    for name, method in originals.items():
        setattr(ScoredLayer, name, timed(method))
    try:
        yield spent
    finally:
        for name, method in originals.items():
            setattr(ScoredLayer, name, method)
