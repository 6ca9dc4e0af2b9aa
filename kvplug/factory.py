"""From a strategy and a model's config, or a folder, to a cache: which layer stands where."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from . import bias, compat, saved
from .cache import Cache
from .compat import (
    KNOWN_LAYERS,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)
from .errors import Mismatch, SpecError
from .facts import difference, facts
from .layers.base import AttentionLayer, Slot
from .layers.combined import with_state
from .layers.layout import Growing
from .layers.probe import positions_depend_on_images
from .layers.rotation import turns
from .prefix import told
from .retention.base import Scored
from .retention.budgets import of_heads
from .retention.full import Full
from .spec import parse
from .stats import Stats
from .strategy import Auto

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from transformers import PreTrainedConfig, PreTrainedModel

    from .layers.rotation import Turn
    from .strategy import Strategy

# transformers' layers of plain attention, with and without a linear-attention state beside it
FULL = (DynamicLayer, LinearAttentionAndFullAttentionLayer)
SLIDING = (DynamicSlidingWindowLayer, LinearAttentionAndSlidingWindowAttentionLayer)


def build(
    spec: str | Strategy,
    config: PreTrainedConfig,
    *,
    max_cache_len: int | None = None,
    cache_config: dict[str, Any] | None = None,
) -> Cache:
    """A cache for models of this config, to be passed as `cache` (before transformers 5.24 as
    `past_key_values`).

    Args:
        spec: a strategy (`kvplug.parse`), where also `static` is ours.
        config: of the model; layer types and windows are read from it, nothing is changed.
        max_cache_len: tokens that a static layout reserves; ignored by others.
        cache_config: more arguments of the strategy by name, e.g. `{"group": 32, "tail": 128}`; and
            `store` and what goes with it, `kvplug.prefix.Reuse`.

    Layers of sliding-window attention keep the model's window and take codec and placement; under
    a compilable static layout they stay in full precision. Layers of cross-attention to images
    keep all of these, and are transformers' own under such a layout. Where a layer holds attention
    and a linear-attention state, the attention is served. Linear-attention, conv, indexed and
    dummy layers are transformers' own.

    Raises:
        SpecError: the strategy cannot be read or built, or not for this model.
        MissingExtra: an optional dependency is not installed.
    """
    reuse, cache_config = told(cache_config)
    strategy = parse(spec, cache_config) if isinstance(spec, str) else spec
    if isinstance(strategy, Auto):
        raise SpecError(
            f"{strategy}: without a call nobody knows the batch, the length and the device: build "
            "kvplug.recommend(config, context=..., batch=...).strategy"
        )
    strategy = strategy.resolve(config, max_cache_len=max_cache_len)
    stats, place = Stats(), strategy.placement.open()
    text = config.get_text_config(decoder=True)
    never, unpadded_only = bias.refusals(text, strategy)
    if never:
        raise SpecError(never)
    unpadded_only = unpadded_only or _needs_own_mask(strategy, config)
    theirs = transformers.DynamicCache(config=config).layers
    _check_known(theirs, strategy, config)
    # what we do not serve stays transformers' own, of the kind that goes with the layout
    stay = theirs
    if strategy.layout.is_compileable(strategy):
        stay = transformers.StaticCache(config=config, max_cache_len=strategy.layout.limit).layers
    # Mllama's: their tokens are those of images
    crossed = getattr(text, "cross_attention_layers", ())
    turn = _turns(strategy, config, theirs, crossed)
    budgets: list[tuple[int, ...] | None] = [None] * len(theirs)
    if strategy.retention.heads is not None:
        budgets = of_heads(strategy.retention, config)
    layers = []
    for i, layer in enumerate(theirs):
        own, window = strategy.at(i, len(theirs)), getattr(layer, "sliding_window", None)
        if i in crossed:
            if stay is not theirs:  # of transformers' own, one that has the columns it is given
                layers.append(layer)
                continue
            own = own.replace(retention=Full(), layout=Growing())
        slot = Slot(own, place, stats, window, turn.get(i), budgets[i], strategy.is_coded)
        layers.append(_layer(layer, slot) or stay[i])
    served = [
        isinstance(x, AttentionLayer) and (x.cuts_blocks or not strategy.is_coded) for x in layers
    ]
    if not any(served):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in theirs})) or "none"
        advice = (
            "'static' leaves windows in full precision; use it without a codec, or the codec "
            "without it"
            if any(type(layer) in SLIDING for layer in theirs)
            else "leave the cache to transformers for this model"
        )
        raise SpecError(
            f"{strategy}: {type(config).__name__} has no attention layer it could serve: {kinds}; "
            f"{advice}"
        )
    for i, codec in strategy.named(len(theirs)).items():
        ours = isinstance(layers[i], AttentionLayer)
        if not ours or (codec.cuts_blocks and not layers[i].cuts_blocks):
            raise SpecError(
                f"{strategy}: {codec} cannot serve layer {i} of {type(config).__name__}, a "
                f"{type(layers[i]).__name__}"
            )
    if reuse is not None:
        reuse.check(strategy)
    kind = Cache
    if compat.is_minimax(text):
        from .minimax import MiniMax as kind  # with the code of the model
    cache = kind(layers, strategy, stats, unpadded_only, facts(text))
    cache.reuse = reuse
    return cache


def load(folder: str | os.PathLike, model: PreTrainedModel) -> Cache:
    """The cache that `Cache.save` has written to `folder`, for `generate` to go on with.

    Pass it with all tokens so far: `model.generate(ids, cache=cache)`, before transformers 5.24
    `past_key_values=cache`. Layers lie where those of the model compute.

    Args:
        folder: what `save` was given.
        model: the one that filled the cache, with the same weights: these are not compared.

    Raises:
        FileNotFoundError: there is no cache in the folder.
        Mismatch: it is of another model or format, or its files are not as they were written.
        SpecError, MissingExtra: its strategy cannot be built here.
    """
    folder = Path(folder)
    head, layers = saved.read(folder)
    cache = build(head["strategy"], model.config.get_text_config(decoder=True))
    if what := difference(head["model"], cache.model):
        raise Mismatch(
            f"the cache in {folder} is of a model whose {what} is {head['model'].get(what)!r}, and "
            f"that of {type(model).__name__} is {cache.model[what]!r}"
        )
    cache.check_state(head["format"], head["strategy"], len(layers))
    devices = compat.layer_devices(model, len(layers))
    for i, (layer, device) in enumerate(zip(layers, devices, strict=True)):
        cache.load_layer(i, saved.state_of(folder, layer, device))
    cache.may_grow = head["may_grow"]
    return cache


def _needs_own_mask(strategy: Strategy, config: PreTrainedConfig) -> str | None:
    """Why not a padded batch: attention that reads dense tensors has transformers' mask alone."""
    attention = compat.attention(config)
    if not isinstance(strategy.retention, Scored) or attention in (None, "sdpa"):
        return None
    return (
        f"{strategy}: rows of unlike length keep unlike tokens, which transformers' mask does not "
        f"hide, and attn_implementation={attention!r} knows no other; load the model with 'sdpa', "
        "or give one row at a time"
    )


def _check_known(theirs: list, strategy: Strategy, config: PreTrainedConfig) -> None:
    """Raise SpecError where a layer of transformers holds keys in a way we do not know."""
    kinds = {type(x) for x in theirs if isinstance(x, CacheLayerMixin)} - set(KNOWN_LAYERS)
    if kinds:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise SpecError(
            f"{strategy}: {type(config).__name__} has attention layers of a kind that kvplug does "
            f"not know: {names}; leave the cache to transformers for this model"
        )


def _turns(
    strategy: Strategy, config: PreTrainedConfig, theirs: list[Any], crossed: Sequence[int]
) -> dict[int, Turn]:
    """How the layers that keep first tokens turn what they store."""
    full = tuple(i for i, x in enumerate(theirs) if type(x) in FULL and i not in crossed)
    if not strategy.retention.first or not full:
        return {}
    text = config.get_text_config(decoder=True)
    if text is not config and positions_depend_on_images(config):
        raise SpecError(
            f"{strategy}: behind an image, positions of {type(config).__name__} are not columns, "
            "and pinned keys would stand in the future; for prompts of text alone build from "
            "config.get_text_config(), else use 'window'"
        )
    return turns(config if config.is_encoder_decoder else text, full)


def _layer(theirs: Any, slot: Slot) -> AttentionLayer | None:
    """Our layer in the place of transformers'; None where that has no plain attention."""
    if type(theirs) not in FULL + SLIDING:
        return None
    kind = slot.strategy.layout.layer(slot)
    if isinstance(theirs, LinearAttentionLayer):
        return with_state(kind)(slot, theirs.number_of_states)
    return kind(slot)
