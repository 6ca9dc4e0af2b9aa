"""How long things will take: predicted from one short measured step of each strategy."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from evals.clock import timed
from kvplug.compat import cache_argument

if TYPE_CHECKING:
    from evals.fill import Filler
    from evals.machine import Machine
    from evals.strategies import Strategy

PROBE = 1024  # tokens in the cache when a strategy's step is measured


class Slope(NamedTuple):
    """Seconds that a strategy adds per token in the cache, for one row of a batch."""

    step: float  # to a decode step
    chunk: float  # to a forward over a chunk
    fill: float  # to put the token there


class Pace:
    """Predictions for one model on this machine, with chunks of one size."""

    def __init__(self, machine: Machine, filler: Filler, chunk: int) -> None:
        self.machine, self.filler, self.chunk_size = machine, filler, chunk
        text = machine.model.config.get_text_config(decoder=True)
        limit = getattr(text, "max_position_embeddings", None) or 8 * PROBE
        self.probe = max(1, min(PROBE, limit - 2 * chunk - 2))
        self.slope = cache(self._slope)

    def step(self, strategy: Strategy, batch: int, context: int) -> float:
        """Predict a decode step."""
        return self.machine.step(batch) + self.slope(strategy).step * batch * context

    def chunks(self, strategy: Strategy, context: int) -> float:
        """Predict feeding a whole text of this length in chunks."""
        base = self.machine.prefill(self.chunk_size)
        return context / self.chunk_size * (base + self.slope(strategy).chunk * context / 2)

    def fill(self, strategy: Strategy, batch: int, context: int) -> float:
        """Predict filling a cache with random numbers."""
        return self.slope(strategy).fill * batch * context

    def _slope(self, strategy: Strategy) -> Slope:
        try:
            fill, chunk, step = self._probe(strategy)
        except Exception:  # it cannot run here: its row will say why
            return Slope(0.0, 0.0, 0.0)
        step -= self.machine.step(1)
        chunk -= self.machine.prefill(self.chunk_size)
        return Slope(*(max(0.0, x) / self.probe for x in (step, chunk, fill)))

    @torch.no_grad()
    def _probe(self, strategy: Strategy) -> list[float]:
        """Return the seconds of a fill, a chunk and a step; the last two after a warm-up."""
        model, size = self.machine.model, self.chunk_size
        cache = strategy.build(model.config, self.probe + 2 * size + 2)
        took = [timed(model.device, lambda: self.filler.fill(cache, 1, self.probe))]
        for length in (size, 1):
            tokens = torch.ones(1, length, dtype=torch.long, device=model.device)

            def forward(tokens: torch.Tensor = tokens) -> None:
                out = model(input_ids=tokens, **cache_argument(cache), use_cache=True)
                out.logits.float().log_softmax(-1)

            timed(model.device, forward)
            took.append(timed(model.device, forward))
        return took
