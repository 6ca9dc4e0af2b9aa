"""How much of a cache each head needs, measured once: what `heads=` of a method reads.

Some heads look back over a whole text, others at its first and newest tokens; which is which is
the model's own, and shows on any text (cf. DuoAttention, arXiv:2410.10819, which trains for it).
Here a head's tokens are taken from it, down to a share of them, and what it then gives to those
that read on is compared with what it gave. Shares go to where they save most, until their mean is
`MEAN`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn.functional import pad

from ..codecs.exact import Exact
from ..compat import cache_argument
from ..errors import SpecError
from ..factory import build
from ..kernels.auto import Auto
from ..layers.layout import Growing
from ..placement.device import Device
from ..stage import option
from ..strategy import Strategy
from .base import Candidates, Scored
from .budgets import SECTION
from .expected import Expected

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SHARES = torch.tensor([1, 2, 3, 4, 6, 8, 10, 12, 14, 16]) / 16
MEAN = 0.25  # of the shares given: about what is kept where budgets are tight
READERS = 256  # tokens that read on
METHOD = Expected(sinks=4, recent=16)  # by whose choice tokens are taken


def measure(model: PreTrainedModel, windows: Tensor) -> dict[str, Tensor]:
    """`need` [L, H] float32 in (0, 1]: the share that each stored head needs; NaN where is none.

    Args:
        model: of transformers, with attention by `sdpa`.
        windows: [W, N] tokens. The first half of each is stored, and the `READERS` next read it.

    Raises SpecError where windows are too short, or no layer can be measured.
    """
    T = windows.shape[1] // 2
    if (least := round(T * float(SHARES[0]))) < METHOD.least:
        raise SpecError(
            f"windows of {windows.shape[1]} tokens are too short to measure heads on: of the least "
            f"share, {least} tokens, nothing is left to choose; take windows of 1,024"
        )
    errors: dict[int, Tensor] = {}
    layers = 0
    for window in windows[:, : T + READERS]:
        probe = Probe(budget=len(window) - 1, stored=T, errors=errors)
        cache = build(Strategy(probe, Growing(), Exact(), Device(), Auto()), model.config)
        layers = len(cache.layers)
        with torch.no_grad():
            model(input_ids=window[None], use_cache=True, **cache_argument(cache))
    if not errors:
        raise SpecError(f"{type(model).__name__} has no layer of full attention to measure")
    needs = torch.full((layers, max(map(len, errors.values()))), torch.nan)
    given = _give(torch.cat([*errors.values()])).split([len(x) for x in errors.values()])
    for i, shares in zip(errors, given, strict=True):
        needs[i, : len(shares)] = shares
    return {f"{SECTION}.need": needs}


@dataclass(frozen=True)
class Probe(Scored):
    """Measures what it is shown of each layer, once `budget` + 1 tokens have come.

    stored: T, tokens of which heads keep a share; the others read them
    errors: by layer, what `_errors` gives, added up
    """

    name: ClassVar[str] = "probe"
    budget: int = option(1, "tokens before the last one")
    every: int = option(1, "the last one")
    stored: int = option(1, "tokens of which heads keep a share")
    layer: int = option(0, "whose it is")
    errors: dict = field(default_factory=dict)

    @property
    def queries(self) -> int:
        return self.budget + 1 - self.stored + METHOD.queries

    def at(self, layer_idx: int, layers: int) -> Probe:
        return dataclasses.replace(self, layer=layer_idx)

    def score(self, tokens: Candidates) -> Tensor:
        self.errors[self.layer] = self.errors.get(self.layer, 0) + _errors(tokens, self.stored)
        return torch.zeros(tokens.positions.shape, device=tokens.keys.device)


def _errors(tokens: Candidates, T: int) -> Tensor:
    """How far off [H, len(SHARES)], relative, each head is with a share of the first T tokens."""
    R = tokens.keys.shape[2] - T
    weights = tokens.attention()[0, :, :, -R:]  # [H, G, R, T + R]
    values = tokens.values[0, :, None].float()
    exact = weights @ values  # [H, G, R, Dv]
    first = dataclasses.replace(
        tokens,
        keys=tokens.keys[:, :, :T],
        values=tokens.values[:, :, :T],
        positions=tokens.positions[:, :, :T],
        queries=tokens.queries[:, :, :-R],
    )
    errors = []
    for share in SHARES.tolist():
        kept = METHOD.with_budget(round(share * T)).keep(first).tokens
        held = torch.zeros_like(first.positions, dtype=torch.bool).scatter(2, kept, True)
        held = pad(held[0], (0, R), value=True)[:, None, None]
        some = weights * held
        off = some @ values / some.sum(-1, keepdim=True) - exact
        errors.append(off.square().sum((1, 2, 3)) / exact.square().sum((1, 2, 3)))
    return torch.stack(errors, dim=-1).cpu()


def _give(errors: Tensor) -> Tensor:
    """Shares [n] of n heads whose mean is MEAN, of how far off each is with each [n, len(SHARES)].

    From the smallest on, to whom more saves most; what is less than rounding saves nothing.
    """
    errors = errors.cummin(-1).values
    rounding = torch.finfo(torch.float32).eps
    at = torch.zeros(len(errors), dtype=torch.long)
    room = (MEAN - SHARES[0]) * len(errors)
    while True:
        more = SHARES - SHARES[at, None]
        saved = errors.gather(1, at[:, None]) - errors
        rate = torch.where((more > 0) & (more <= room + 1e-6) & (saved > rounding), saved / more, 0)
        if not rate.any():
            return SHARES[at]
        head, then = divmod(int(rate.argmax()), len(SHARES))
        room -= more[head, then]
        at[head] = then
