"""How fast this machine is, measured in a few seconds: what predictions and floors rest on."""

from __future__ import annotations

import statistics
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from evals.measure import clock
from evals.setup.model import positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

READ = {"cpu": 1 << 28, "cuda": 1 << 30}  # bytes, several times any cache of the processor
WARMUP, STEPS = 4, 8
PROMPTS = 128, 1024  # tokens


class Machine:
    """The figures of one model on one device, each measured when first asked for."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._steps: dict[int, float] = {}

    @cached_property
    def bandwidth(self) -> float:
        """Bytes per second from memory: the best of summing, multiplying and copying."""
        return bandwidth(self.model.device)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads: a table of embeddings that is only looked up, not."""
        table = self.model.get_input_embeddings().weight
        head = self.model.get_output_embeddings()
        looked_up = head is None or head.weight is not table
        return sum(p.nbytes for p in self.model.parameters()) - looked_up * table.nbytes

    def prefill(self, tokens: int) -> float:
        """Seconds of one forward over a prompt, by what short and longer ones take."""
        flat, bent = self._prefill
        return flat * tokens + bent * tokens**2

    @cached_property
    def _prefill(self) -> tuple[float, float]:
        """Seconds per token, and per token squared."""
        limit = positions(self.model) or PROMPTS[1]
        lengths = [min(tokens, limit // part) for tokens, part in zip(PROMPTS, (2, 1), strict=True)]
        rates = []
        for tokens, times in zip(lengths, (2, 1), strict=True):  # the first of all warms up
            prompt = torch.ones(1, tokens, dtype=torch.long, device=self.model.device)
            took = min(clock.step(self.model, None, prompt)[1] for _ in range(times))
            rates.append(took / tokens)
        bent = max(0.0, (rates[1] - rates[0]) / (lengths[1] - lengths[0]))
        return max(rates[0] - bent * lengths[0], 0.0) or rates[1], bent

    def step(self, batch: int) -> float:
        """Seconds of one decode step that has next to no context."""
        if batch not in self._steps:
            from transformers import DynamicCache

            cache = DynamicCache(config=self.model.config)
            token = torch.ones(batch, 1, dtype=torch.long, device=self.model.device)
            times = [clock.step(self.model, cache, token)[1] for _ in range(WARMUP + STEPS)]
            self._steps[batch] = statistics.median(times[WARMUP:])
        return self._steps[batch]


def bandwidth(device: torch.device) -> float:
    """Return bytes per second that this device reads, or reads and writes, at best."""
    rows = torch.ones(READ.get(device.type, 1 << 28) // 16384, 4096, device=device)
    vector, target = torch.ones(4096, device=device), torch.empty_like(rows)
    ways = {
        lambda: rows.sum(): rows.nbytes,
        lambda: rows @ vector: rows.nbytes,
        lambda: target.copy_(rows): 2 * rows.nbytes,
    }
    return max(size / min(clock.timed(device, way) for _ in range(4)) for way, size in ways.items())
