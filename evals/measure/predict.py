"""How long things will take: predicted from one short measured step of each contender."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from evals.measure.clock import timed
from evals.setup.model import positions
from kvplug.compat import cache_argument

if TYPE_CHECKING:
    from evals.measure.fill import Filler
    from evals.measure.machine import Machine
    from evals.setup.contenders import Contender

PROBE = 1024  # tokens in the cache when a contender's step is measured


class Slope(NamedTuple):
    """Seconds that a contender adds per token in the cache, for one row of a batch."""

    step: float  # to a decode step
    chunk: float  # to a forward over a chunk
    fill: float  # to put the token there


class Predictor:
    """Predicts seconds for one model on this machine, with chunks of one size."""

    def __init__(self, machine: Machine, filler: Filler, chunk: int) -> None:
        self.machine, self.filler, self.chunk_size = machine, filler, chunk
        limit = positions(machine.model) or 8 * PROBE
        self.probe = max(1, min(PROBE, limit - 2 * chunk - 2))
        self.slope = cache(self._slope)

    def step(self, contender: Contender, batch: int, context: int) -> float:
        """Predict a decode step."""
        return self.machine.step(batch) + self.slope(contender).step * batch * context

    def answer(self, contender: Contender, batch: int, context: int, steps: int) -> float:
        """Predict a prefill in one forward, and decode steps after it."""
        decode = steps * self.step(contender, batch, context)
        return batch * self.machine.prefill(context) + decode

    def chunks(self, contender: Contender, context: int) -> float:
        """Predict feeding a whole text of this length in chunks."""
        base = self.machine.prefill(self.chunk_size)
        return context / self.chunk_size * (base + self.slope(contender).chunk * context / 2)

    def fill(self, contender: Contender, batch: int, context: int) -> float:
        """Predict filling a cache with random numbers."""
        return self.slope(contender).fill * batch * context

    def _slope(self, contender: Contender) -> Slope:
        try:
            fill, chunk, step = self._probe(contender)
        except Exception:  # it cannot run here: its row will say why
            return Slope(0.0, 0.0, 0.0)
        step -= self.machine.step(1)
        chunk -= self.machine.prefill(self.chunk_size)
        return Slope(*(max(0.0, x) / self.probe for x in (step, chunk, fill)))

    @torch.no_grad()
    def _probe(self, contender: Contender) -> list[float]:
        """Return the seconds of a fill, a chunk and a step; the last two after a warm-up."""
        model, size = self.machine.model, self.chunk_size
        cache = contender.build(model.config, self.probe + 2 * size + 2)
        took = [timed(model.device, lambda: self.filler.fill(cache, 1, self.probe))]
        for length in (size, 1):
            tokens = torch.ones(1, length, dtype=torch.long, device=model.device)

            def forward(tokens: torch.Tensor = tokens) -> None:
                out = model(input_ids=tokens, **cache_argument(cache), use_cache=True)
                out.logits.float().log_softmax(-1)

            timed(model.device, forward)
            took.append(timed(model.device, forward))
        return took
