"""A cache filled with random numbers, in place of a prefill that would take minutes.

How long a decode step takes depends on how much is stored and how, not on what. Shapes and dtypes
are those that the model's own first tokens left in a `DynamicCache`; each layer gets its tokens by
`cache.update`, as in a forward pass.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from evals.measure import clock
from evals.measure.memory import held_bytes
from kvplug.compat import DynamicLayer, DynamicSlidingWindowLayer
from kvplug.layers.fill import attend_and_settle

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from evals.setup.contenders import Contender

PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)  # layers that hold keys and values, nothing else
RANDOM = "K/V random, in the shapes of the model's own"
TRUE = "filled by a true prefill: this model has layers that hold more than keys and values"


class Filler:
    """Fills caches of one model."""

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self.model, self.seed = model, seed
        self._stored: dict[tuple[Contender, int], int] = {}
        probe = DynamicCache(config=model.config)
        clock.step(model, probe, torch.ones(1, 2, dtype=torch.long, device=model.device))
        self.like = None
        if all(type(layer) in PLAIN for layer in probe.layers):
            self.like = [(layer.keys[:, :, :1], layer.values[:, :, :1]) for layer in probe.layers]

    @property
    def note(self) -> str:
        """How caches are filled, for rows."""
        return RANDOM if self.like else TRUE

    @torch.no_grad()
    def fill(self, cache: Cache, batch: int, context: int) -> None:
        """Put `context` tokens into an empty cache."""
        if self.like is None:
            ids = torch.ones(batch, context, dtype=torch.long, device=self.model.device)
            clock.step(self.model, cache, ids)
            return
        made: dict = {}
        for index, pair in enumerate(self.like):
            kind = tuple((x.shape, x.dtype, x.device) for x in pair)
            if kind not in made:
                made[kind] = [self._random(x, batch, context) for x in pair]
            self._put(cache, index, *(x.clone() for x in made[kind]))

    def _put(self, cache: Cache, index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put keys and values [B, H, T, D] into a layer."""
        heads = self.model.config.get_text_config(decoder=True).num_attention_heads
        visible = cache.update(keys, values, index)
        attend_and_settle(cache.layers[index], keys, visible, heads)

    def stored_bytes(self, contender: Contender, context: int) -> int:
        """Return the bytes that `context` tokens of one row take."""
        if (contender, context) not in self._stored:
            self._stored[contender, context] = self._count(contender, context)
        return self._stored[contender, context]

    @torch.no_grad()
    def _count(self, contender: Contender, context: int) -> int:
        """Fill one layer of each kind, and multiply."""
        cache = contender.build(self.model.config, context)
        if self.like is None:
            self.fill(cache, 1, context)
            return held_bytes(cache)
        kinds = [
            (
                type(layer),
                getattr(layer, "is_sliding", False),
                getattr(layer, "strategy", None),  # layers may have codecs of their own
                *(x.shape for x in pair),
            )
            for layer, pair in zip(cache.layers, self.like, strict=True)
        ]
        total = 0
        for kind, count in Counter(kinds).items():
            index = kinds.index(kind)
            self._put(cache, index, *(self._random(x, 1, context) for x in self.like[index]))
            total += count * held_bytes(cache.layers[index])
        return total

    def exact_bytes(self, batch: int, context: int) -> int:
        """Return the bytes of `context` tokens in full precision, windows not considered."""
        if self.like is None:
            return 0
        return batch * context * sum(x.nbytes for pair in self.like for x in pair)

    def _random(self, like: torch.Tensor, batch: int, context: int) -> torch.Tensor:
        generator = torch.Generator(like.device).manual_seed(self.seed)
        shape = (batch, like.shape[1], context, like.shape[3])
        return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)
