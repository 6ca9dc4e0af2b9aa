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
from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING:
    from types import ModuleType

TESTED = ("5.17.0", "5.23.0", "5.24.0")  # what the tests run on


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
LinearAttentionLayer = layer_class("LinearAttentionLayer")
LinearAttentionAndFullAttentionLayer = layer_class("LinearAttentionAndFullAttentionLayer")
LinearAttentionAndSlidingWindowAttentionLayer = layer_class(
    "LinearAttentionAndSlidingWindowAttentionLayer"
)
StaticLayer = layer_class("StaticLayer")
StaticSlidingWindowLayer = layer_class("StaticSlidingWindowLayer")
EncoderDecoderCache = layer_class("EncoderDecoderCache")
# layers of a dynamic cache that hold keys and values. One stays transformers' own: that with an
# index beside the keys. Layers of another base (a state alone, dummies) hold no keys.
KNOWN_LAYERS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    layer_class("DynamicIndexedLayer"),
)

# the values of `cache_implementation` that are transformers' own, "paged" beside its list
KNOWN_NAMES = find("generation.configuration_utils", "ALL_CACHE_IMPLEMENTATIONS")
DOCUMENTED_NAMES = ("dynamic", "offloaded", "static", "offloaded_static", "quantized")
THEIR_NAMES: tuple[str, ...] = (*(KNOWN_NAMES or DOCUMENTED_NAMES), "paged")


def modeling(config: Any) -> ModuleType:
    """The module with the model's own code. Raises ImportError."""
    try:  # beside its config
        return import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    except ModuleNotFoundError:  # a config for the code of another model
        model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if model is None:
            raise
        return import_module(model.__module__)


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


# where `generate` keeps the length of a mask that hides nothing, and which it leaves out (5.24)
MASK_LENGTH = "_mask_length"

# of a config: how attention is computed
ATTENTION = "_attn_implementation"


def put_cache(model_kwargs: dict, old: Any, new: Any) -> None:
    """A cache under the name that another has among a model's arguments, or this version's."""
    found = (k for k, value in model_kwargs.items() if old is not None and value is old)
    model_kwargs[next(found, CACHE_ARGUMENT)] = new


def cache_layers(config: Any) -> int:
    """How many layers a cache for a model of this config has."""
    return len(transformers.DynamicCache(config=config).layers)


def layer_devices(model: Any, layers: int) -> list[torch.device]:
    """Where the attention of each layer of a model computes."""
    devices = [model.device] * layers
    for module in model.modules():
        i = getattr(module, "layer_idx", None)
        if isinstance(i, int) and 0 <= i < layers:
            for part in module.modules():
                # where accelerate keeps weights elsewhere, a hook says where they are brought to
                brought = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
                of_weights = (x.device for x in part.parameters(recurse=False))
                where = next(of_weights, None) if brought is None else torch.device(brought)
                if where is not None:
                    devices[i] = where
                    break
    return devices


def attention(config: Any) -> str | None:
    """How attention of this config is computed; None: not settled yet."""
    return getattr(config, ATTENTION, None)


def rope_types(config: Any) -> set[str]:
    """The kinds of rotary embedding that a config names, of all its layers."""
    found = getattr(config, "rope_parameters", None) or {}
    kinds = found.values() if all(isinstance(x, dict) for x in found.values()) else [found]
    return {kind["rope_type"] for kind in kinds if kind.get("rope_type")}


def is_sdpa(config: Any) -> bool:
    """Whether attention of this config is torch's `scaled_dot_product_attention`."""
    return attention(config) == "sdpa"


def reads_dense_only(config: Any) -> bool:
    """Whether attention of this config compiles itself: views cannot be read inside of that."""
    return attention(config) == "flex_attention"


# what is wrapped, and the parameters and fields that are read
VALIDATE = "validate"  # of GenerationConfig; this and below of GenerationMixin
PREPARE_CONFIG = "_prepare_generation_config"
PREPARE_CACHE = "_prepare_cache_for_generation"
PREFILL = "_prefill"
ASSISTED = "_assisted_decoding"
PARAMETERS = {
    VALIDATE: ("self",),
    PREPARE_CONFIG: ("self", "generation_config"),
    PREPARE_CACHE: ("self", "generation_config", "model_kwargs", "max_cache_length"),
    PREFILL: ("self", "input_ids", "generation_config", "model_kwargs"),
    ASSISTED: ("self",),
}
CONFIG_FIELDS = (
    "cache_implementation",
    "cache_config",
    "use_cache",
    "is_assistant",
    "max_cache_len",
    "prompt_lookup_num_tokens",
    "prefill_chunk_size",
)


def problems() -> list[str]:
    """What `hook` needs and does not find in the installed transformers; [] where all is there."""
    missing = []
    for name, wanted in PARAMETERS.items():
        owner = transformers.GenerationConfig if name == VALIDATE else transformers.GenerationMixin
        method = getattr(owner, name, None)
        if not callable(method):
            missing.append(f"{owner.__name__}.{name}")
            continue
        has = inspect.signature(method).parameters
        missing += [f"argument {x!r} of {owner.__name__}.{name}" for x in wanted if x not in has]
    config = transformers.GenerationConfig()
    missing += [f"GenerationConfig.{x}" for x in CONFIG_FIELDS if not hasattr(config, x)]
    if cache_field() is None:
        missing.append("the cache in GenerateDecoderOnlyOutput")
    if not KNOWN_NAMES:
        missing.append("ALL_CACHE_IMPLEMENTATIONS")
    return missing


def advice(missing: list[str]) -> str:
    """What to tell who names a strategy on a transformers where `missing` is."""
    return (
        f"transformers {transformers.__version__} is not one that kvplug can add names to: it has "
        f"no {', no '.join(missing)}. Tested: {', '.join(TESTED)}. Update kvplug, or run "
        f"pip install 'transformers=={TESTED[-1]}', or pass an object instead of a name: "
        "generate(..., cache=kvplug.build(...))"
    )


# the class of cache that models of this kind alone make for themselves, and take
MINIMAX = "models.minimax.modeling_minimax", "MiniMaxCache"


def is_minimax(config: Any) -> bool:
    """Whether models of this config take no cache but a `MiniMaxCache`."""
    return config.model_type == "minimax" and find(*MINIMAX) is not None


def builds_own_cache(model: Any) -> bool:
    """Whether transformers leaves the cache to the model's own code, as where it is a state."""
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    return supports is not None and not supports()
