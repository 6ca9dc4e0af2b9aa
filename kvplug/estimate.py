"""Bytes a strategy will hold, from a config alone: a real cache filled with data-less tensors."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from .cache import nbytes
from .compat import THEIR_NAMES, CacheLayerMixin, StaticLayer, modeling
from .errors import KvplugError, SpecError, unknown
from .factory import build
from .layers.base import AttentionLayer
from .layers.fill import attend_and_settle
from .layers.ragged import RaggedLayer
from .layers.scored import ScoredLayer
from .spec import PREFIX, PRESETS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .cache import Cache
    from .spec import Strategy

DTYPES = ("float32", "bfloat16", "float16")
MOST = 1 << 40  # tokens: their bytes still fit an integer of 64 bits


def estimate(
    spec: str | Strategy,
    config: PreTrainedConfig,
    *,
    context: int,
    batch: int = 1,
    dtype: torch.dtype | str | None = None,
    decoded: int = 0,
) -> int:
    """Bytes a cache will hold after `context` tokens: what its `nbytes()` says then.

    Args:
        spec: a strategy, named as in `generate`; a static one reserves `context` tokens unless it
            says otherwise.
        config: of the model; no weights are needed.
        context: tokens in all.
        batch: rows.
        dtype: of keys and values, or its name; default: the config's, else float32.
        decoded: how many of the tokens come one by one, after a prompt of the others: room that
            grows is reserved ahead then.

    Raises SpecError for a strategy that cannot be, a name that means a cache of transformers' own
    in `generate`, a name that no dtype has, and more tokens than bytes can be counted for.
    State of linear-attention and conv layers is not counted, which does not grow with context, nor
    the keys of an indexer (sparse attention, as of GLM-MoE-DSA), one narrow head of a layer. Where
    a method chooses by content it is what is left of a prompt; what is left of tokens decoded after
    it is near that, the room between two choices depending on which tokens these were.
    """
    if spec in THEIR_NAMES:
        ours = PREFIX + spec if PREFIX + spec in PRESETS else "growing"
        raise SpecError(
            f"{spec!r} names a cache of transformers' own, as in `generate`; of ours the nearest "
            f"is {ours!r}"
        )
    if context * batch > MOST:
        raise SpecError(
            f"context {context:,} x batch {batch:,}: bytes are counted for at most {MOST:,} tokens"
        )
    text = config.get_text_config(decoder=True)
    dtype = dtype_of(text, dtype)
    cache = _cache(spec, text, context)
    shapes = kv_shapes(text, len(cache.layers))
    configs = _by_layer(text, len(cache.layers))
    of_kind: dict[tuple, int] = {}
    more = 0  # of layers that are like one that was filled
    for whole, whole_shape, own in zip(cache.layers, shapes, configs, strict=True):
        for layer, shape in _parts(whole, whole_shape):
            kind = _kind(layer), shape
            if kind in of_kind:  # encoding takes a while, even of no data
                more += of_kind[kind]
                continue
            before = nbytes(layer)
            prompt, more_come, heads = context - decoded, decoded, 0
            if isinstance(layer, ScoredLayer):  # nothing can be chosen among tokens of no data
                prompt, more_come = layer.retention.last_choice(prompt, more_come)
                heads = own.num_attention_heads * shape[0] // whole_shape[0]
            _fill(layer, shape, batch, [prompt, *[1] * more_come], dtype, heads)
            of_kind[kind] = nbytes(layer) - before
    return cache.nbytes() + more


def _parts(layer: Any, shape: tuple[int, int, int]) -> list[tuple[Any, tuple[int, int, int]]]:
    """What holds tokens on its own, and of which shape: a layer, or groups of its heads."""
    if not isinstance(layer, CacheLayerMixin):  # a state, or nothing
        return []
    if not isinstance(layer, RaggedLayer):
        return [(layer, shape)]
    groups = layer.heads.groups
    return [(x, (len(g), *shape[1:])) for x, g in zip(layer.parts, groups, strict=True)]


def _kind(layer: Any) -> tuple:
    """What two layers have in common that hold as many bytes of tokens of one shape."""
    if isinstance(layer, AttentionLayer):
        slot = layer.slot
        return type(layer), slot.strategy, slot.sliding_window, slot.coded
    numbers = ((name, x) for name, x in vars(layer).items() if isinstance(x, (int, type(None))))
    return type(layer), *sorted(numbers)


def _fill(
    layer: Any,
    shape: tuple[int, int, int],
    batch: int,
    calls: list[int],
    dtype: torch.dtype,
    heads: int,
) -> None:
    """Give a layer as many tokens of no data as come in each of the calls, and as many queries."""
    H, Dk, Dv = shape
    for S in calls:
        key, value = (torch.empty(batch, H, S, D, dtype=dtype, device="meta") for D in (Dk, Dv))
        if isinstance(layer, StaticLayer):  # all room is reserved ahead
            layer.lazy_initialization(key, value)
            return
        attend_and_settle(layer, key, layer.update(key, value), heads)


def dtype_of(config: PreTrainedConfig, dtype: torch.dtype | str | None) -> torch.dtype:
    """The dtype, named or not; without one the config's, else float32. SpecError for others."""
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise SpecError(unknown("dtype", dtype, list(DTYPES)))
        return getattr(torch, dtype)
    return dtype or getattr(config, "dtype", None) or torch.float32


def _cache(spec: str | Strategy, config: PreTrainedConfig, context: int) -> Cache:
    with contextlib.suppress(ImportError):
        modeling(config)  # layers of a model's own are known to transformers once it is imported
    try:
        return build(spec, config, max_cache_len=context)
    except KvplugError:
        raise
    except (AttributeError, KeyError, ValueError) as e:
        raise SpecError(
            f"transformers makes no cache from {type(config).__name__} alone "
            f"({type(e).__name__}: {e})"
        ) from e


def kv_shapes(config: PreTrainedConfig, layers: int) -> list[tuple[int, int, int]]:
    """Stored heads, key width and value width of each layer."""
    return [_kv_shape(c) for c in _by_layer(config, layers)]


def _by_layer(config: PreTrainedConfig, layers: int) -> list[PreTrainedConfig]:
    return list(getattr(config, "per_layer_config", None) or [config] * layers)[:layers]


def _stores_latents(config: PreTrainedConfig) -> bool:
    """Whether the model stores latents and expands them after the cache: newer transformers do."""
    classes = (x for x in vars(modeling(config)).values() if isinstance(x, type))
    return any(hasattr(x, "expand_kv") for x in classes)


def _kv_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    # GPTBigCode, Falcon; the newer Falcons store every head
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        kv_heads = 1
    if not kv_heads:
        raise SpecError(f"{type(config).__name__} does not say how many heads of attention it has")
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if rope := getattr(config, "qk_rope_head_dim", None):  # multi-head latent attention
        if _stores_latents(config):
            return 1, config.kv_lora_rank, rope
        return heads, config.qk_nope_head_dim + rope, config.v_head_dim
    return kv_heads, width, width
