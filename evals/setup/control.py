"""Rows that measure the measuring: what must be seen, what must not, and how far a figure is from
itself.

control:broken  a codec that does not work; a harness that sees no drift here sees none at all
control:plain   no cache: one forward with labels must give the exact cache's perplexity
control:same    the exact cache once more; how much it differs is the noise
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import kvplug
from evals.setup.contenders import Contender, Rival
from kvplug.codecs.rotated import Int2
from kvplug.spec import parse

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache, PreTrainedConfig

SAME = "control:same"
LEAST_KL = 0.05  # nat, that the broken codec must cost
MOST_KL = 1e-9  # nat, that the exact cache may differ from itself
TOLERANCE = {"float32": 1e-4}  # relative, between two ways to the same perplexity; others:
TOLERANCE_HALF = 1e-2


class SelfCheckFailed(AssertionError):
    """The harness does not measure what it says: none of its figures can be trusted."""


@dataclass(frozen=True)
class BrokenCodec(Int2):
    """2-bit integers whose zero points and scales went to the wrong channels and tokens."""

    name: ClassVar[str] = "broken"
    tail: int = 0
    block: int = 16

    def encode_side(self, x: Tensor, side: int) -> dict[str, Tensor]:
        data = super().encode_side(x, side)
        name = ("k_zero", "v_scale")[side]  # of channels, of tokens
        return data | {name: data[name].flip(3)}


@dataclass(frozen=True)
class Broken(Contender):
    """The negative control."""

    name: str = "control:broken"

    @property
    def spec(self) -> str:
        """A codec that no registry knows."""
        return repr(BrokenCodec())

    def build(self, config: PreTrainedConfig, max_cache_len: int) -> Cache:
        """Return an empty cache that will not work."""
        return kvplug.build(parse("growing").replace(codec=BrokenCodec()), config)


@dataclass(frozen=True)
class Same(Rival):
    """The exact cache, measured again."""

    name: str = SAME
    module: str = "evals.rivals.transformers_dynamic"


@dataclass(frozen=True)
class Plain(Contender):
    """No cache at all."""

    name: str = "control:plain"

    @property
    def spec(self) -> str:
        """How its figures are got."""
        return "one forward with labels, use_cache=False"


def check_exact(result: dict[str, float]) -> None:
    """Raise unless the exact cache is equal to itself."""
    if result["kl"] > MOST_KL:
        raise SelfCheckFailed(
            f"the exact cache measured twice differs from itself by a KL of {result['kl']:.2g}"
        )


def check_broken(result: dict[str, float]) -> None:
    """Raise unless the broken codec drifts."""
    if result["kl"] < LEAST_KL:
        raise SelfCheckFailed(
            f"the broken codec shows a KL of only {result['kl']:.2g}, less than {LEAST_KL}: drift "
            "is not seen here. Is the window long enough, and fed in chunks?"
        )


def check_plain(plain: float, exact: float, dtype: str) -> None:
    """Raise unless a forward without a cache gives the exact cache's perplexity."""
    if abs(plain / exact - 1) > TOLERANCE.get(dtype, TOLERANCE_HALF):
        raise SelfCheckFailed(
            f"perplexity through the exact cache is {exact:.6g}, without a cache {plain:.6g}"
        )
