"""Every private name of transformers that kvplug relies on, looked up once.

transformers renames what its documentation does not promise: 5.24 calls `cache` what was called
`past_key_values`. Names are therefore derived from transformers where that is possible, and nothing
here fails where one is gone: `problems` says what is missing, and `hook` raises that as soon as a
strategy is named. Versions are told to the user, never compared.
"""

from __future__ import annotations

import inspect
import typing
from importlib import import_module
from typing import Any

import transformers

TESTED = ("5.17.0", "5.23.0", "5.24.0")  # the whole suite passes on each


def find(module: str, name: str) -> Any:
    """`name` of a module of transformers, None where module or name is gone."""
    try:
        return getattr(import_module(f"transformers.{module}"), name, None)
    except ImportError:
        return None


def layer_class(name: str) -> type:
    """A class of `transformers.cache_utils`; where it is gone, one that nothing is made of."""
    found = find("cache_utils", name)
    return found if isinstance(found, type) else type(name, (), {})


CacheLayerMixin = layer_class("CacheLayerMixin")
DynamicLayer = layer_class("DynamicLayer")
DynamicSlidingWindowLayer = layer_class("DynamicSlidingWindowLayer")
StaticLayer = layer_class("StaticLayer")

# the values of `cache_implementation` that are transformers' own
THEIR_NAMES: tuple[str, ...] = (
    *(find("generation.configuration_utils", "ALL_CACHE_IMPLEMENTATIONS") or ()),
    "paged",
)


def cache_field() -> str | None:
    """The name of the cache in outputs of `generate`: `cache`, before 5.24 `past_key_values`."""
    output = find("generation.utils", "GenerateDecoderOnlyOutput")
    hints = typing.get_type_hints(output) if output else {}
    fields = (k for k, v in hints.items() if transformers.Cache in (v, *typing.get_args(v)))
    return next(fields, None)


CACHE_ARGUMENT = cache_field() or "past_key_values"
# all names a model may take its cache under: what this version wants, then what others did
CACHE_ARGUMENTS = tuple(dict.fromkeys((CACHE_ARGUMENT, "cache", "past_key_values", "cache_params")))


def cache_argument(cache: Any) -> dict[str, Any]:
    """`model(ids, **cache_argument(cache))`: by the name that this transformers wants."""
    return {CACHE_ARGUMENT: cache}


def output_cache(output: Any) -> Any:
    """The cache in what a model or `generate` returned."""
    return getattr(output, CACHE_ARGUMENT)


# what is wrapped, and the parameters that are read
VALIDATE = "validate"
PREPARE = "_prepare_cache_for_generation"
PREPARE_PARAMETERS = ("generation_config", "model_kwargs", "max_cache_length")
CONFIG_FIELDS = ("cache_implementation", "cache_config", "use_cache", "is_assistant")


def problems() -> list[str]:
    """What `hook` needs and does not find in the installed transformers; [] where all is there."""
    mixin, config = transformers.GenerationMixin, transformers.GenerationConfig
    missing = []
    if not callable(getattr(config, VALIDATE, None)):
        missing.append(f"GenerationConfig.{VALIDATE}")
    prepare = getattr(mixin, PREPARE, None)
    if not callable(prepare):
        missing.append(f"GenerationMixin.{PREPARE}")
    else:
        known = inspect.signature(prepare).parameters
        missing += [f"{PREPARE}({x}=)" for x in PREPARE_PARAMETERS if x not in known]
    plain = config()
    missing += [f"GenerationConfig.{x}" for x in CONFIG_FIELDS if not hasattr(plain, x)]
    if cache_field() is None:
        missing.append("the cache among the fields of GenerateDecoderOnlyOutput")
    if len(THEIR_NAMES) == 1:
        missing.append("ALL_CACHE_IMPLEMENTATIONS")
    return missing
