"""What is measured: by a row's name something that builds a cache, kvplug's own or a rival."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import kvplug
from evals import rivals
from evals.setup.config import ConfigError
from kvplug.compat import cache_argument
from kvplug.errors import unknown
from kvplug.spec import parse

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import Cache, PreTrainedConfig, PreTrainedModel

EXACT = "transformers:dynamic"  # what others are compared to, and the first row of most runs
# Names that both libraries have: which one a bare name means here.
BARE = {"dynamic": EXACT, "static": "kvplug:static", "quantized": "kvplug:quantized"}


@dataclass(frozen=True)
class Contender:
    """A kvplug strategy. Subclasses are what else can have a row: rivals and controls."""

    name: str

    @property
    def spec(self) -> str:
        """The strategy with every default written out: what the name stood for when it ran."""
        return repr(parse(self.name))

    def build(self, config: PreTrainedConfig, max_cache_len: int) -> Cache:
        """Return an empty cache for a model of this config."""
        return kvplug.build(self.name, config, max_cache_len=max_cache_len)

    def generate_arguments(self, config: PreTrainedConfig, max_cache_len: int) -> dict[str, Any]:
        """Return what selects this cache in `generate`: its name."""
        return {"cache_implementation": self.name}


@dataclass(frozen=True)
class Rival(Contender):
    """A cache from elsewhere, built by its adapter."""

    module: str

    @property
    def spec(self) -> str:
        """The adapter that builds it."""
        return self.module

    def build(self, config: PreTrainedConfig, max_cache_len: int) -> Cache:
        """Return an empty cache for a model of this config."""
        return import_module(self.module).build(config, max_cache_len)

    def generate_arguments(self, config: PreTrainedConfig, max_cache_len: int) -> dict[str, Any]:
        """Return what selects this cache in `generate`: an object, since it has no name there."""
        return cache_argument(self.build(config, max_cache_len))


@dataclass(frozen=True)
class Outside(Rival):
    """A method from elsewhere that is no cache: it answers, in an environment of its own."""

    def build(self, config: PreTrainedConfig, max_cache_len: int) -> Cache:
        """Raise a `ConfigError`: there is none to be built."""
        raise ConfigError(
            f"{self.name} is no cache: only suites 'retrieval' and 'unseen' measure it"
        )

    def answers(
        self, model: PreTrainedModel, prompt: list[int], asks: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Return what it found: see `evals/rivals/__init__.py`."""
        return import_module(self.module).answers(model, prompt, asks)


def file_name(name: str) -> str:
    """Return a contender's name as a file may be called, unlike any other's.

    >>> file_name("sinks(sinks=4, window=60)+int8")
    'sinks(sinks=4,window=60)+int8'
    """
    return name.replace(" ", "").replace(":", "-").replace("/", "-")


def resolve(names: Iterable[str]) -> list[Contender]:
    """Check every name; return the contenders in order, the exact cache first, none twice."""
    known = rivals.modules()
    found: dict[str, Contender] = {EXACT: Rival(EXACT, known[EXACT])}
    for name in (BARE.get(name, name) for name in names):
        if name in known:
            found[name] = _rival(name, known[name])
        elif name.split(":")[0] in {rival.split(":")[0] for rival in known}:
            raise ConfigError(unknown("rival", name, list(known)))
        else:
            try:
                parse(name)
            except (ValueError, ImportError) as error:  # a wrong spec, or an extra not installed
                raise ConfigError(
                    f"strategy {name!r}: {error} Rivals: {', '.join(known)}."
                ) from error
            found[name] = Contender(name)
    return list(found.values())


def _rival(name: str, module: str) -> Rival:
    """Return the row of a module; one that cannot be imported will say so itself."""
    try:
        is_cache = hasattr(import_module(module), "build")
    except ImportError:
        is_cache = True
    return (Rival if is_cache else Outside)(name, module)
