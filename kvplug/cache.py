"""The cache object: transformers' `Cache` over kvplug's layers, and what it holds in bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers

from .compat import (
    KNOWN_LAYERS,
    THEIR_NAMES,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)
from .errors import SpecError
from .layer import Layer
from .probe import positions_depend_on_images
from .retention.window import Window
from .rope import turns
from .spec import PREFIX, Strategy, parse
from .static import StaticCodedLayer
from .static import StaticLayer as OurStaticLayer
from .stats import Stats

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

    from .rope import Turn


class Cache(transformers.Cache):
    """A cache built from a strategy: all that transformers' `Cache` does, and what it holds."""

    def __init__(self, layers: list, strategy: Strategy, stats: Stats) -> None:
        super().__init__(layers=layers)
        self.strategy, self._stats = strategy, stats

    def nbytes(self) -> int:
        """Bytes of all tensors reachable from here, shared storage once, reserved room included."""
        return sum(_storages(self).values())

    def held(self, layer_idx: int = 0) -> int:
        """Tokens of a layer that the next query can see; `get_seq_length` counts those seen."""
        layer = self.layers[layer_idx]
        return (
            layer.held()
            if isinstance(layer, (Layer, OurStaticLayer))
            else int(layer.get_seq_length())
        )

    def stats(self) -> dict:
        """What ran: calls per kernel, dense copies by cause, blocks encoded; and the full spec."""
        return {"strategy": repr(self.strategy)} | self._stats.as_dict()

    def set_padding(self, attention_mask: Tensor | None) -> None:
        """Tell which tokens are left padding: attention_mask [B, T], 0 for padding.

        `generate` does this. In a loop of your own, do it before the first forward pass where
        retention pins or picks tokens; others do not need it.
        """
        if attention_mask is None or attention_mask.dim() != 2:
            return
        padding = (attention_mask.long().cumsum(-1) == 0).sum(-1)  # [B]
        for layer in self.layers:
            if isinstance(layer, Layer):
                layer.set_padding(padding)

    def check_positions(self, position_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Refuse positions that pinned keys would be turned to wrongly, as `generate` does.

        Args:
            position_ids: [B, T] or [N, B, T], of a prompt's columns; in each row and each of the N
                they must run on by one from its first token to its last.
            attention_mask: [B, T] or longer to the left, 0 for columns that hold no token.

        Raises SpecError.
        """
        pins = (layer.pins for layer in self.layers if isinstance(layer, Layer))
        if not any(rotation for p in pins if p is not None for rotation in p.turn):
            return
        T = position_ids.shape[-1]
        ahead = position_ids - torch.arange(T, device=position_ids.device)
        highest = lowest = ahead
        if attention_mask is not None and attention_mask.dim() == 2:
            empty, far = attention_mask[:, -T:] == 0, torch.iinfo(ahead.dtype).max
            highest, lowest = torch.where(empty, -far, ahead), torch.where(empty, far, ahead)
        if (highest.amax(-1) > lowest.amin(-1)).any():
            raise SpecError(
                f"{self.strategy}: positions of this prompt are not its columns, as with images in "
                "models that give these positions of their own, or a mask with holes: pinned keys "
                "would be turned wrongly; use 'window'"
            )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens to a layer (see `Layer.update`) while the next layer fetches its blocks."""
        if self.strategy.placement.name != "device":
            following = self.layers[(layer_idx + 1) % len(self.layers)]
            if isinstance(following, Layer):
                following.prefetch()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def __repr__(self) -> str:
        seen = self.get_seq_length()
        return f"kvplug.Cache({str(self.strategy)!r}, layers={len(self.layers)}, seen={seen})"


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
        cache_config: more arguments of the strategy by name, e.g. `{"group": 32, "tail": 128}`.

    Layers of sliding-window attention keep the model's window and take codec and placement.
    Linear-attention, conv, indexed and dummy layers are transformers' own. Under a compilable
    static layout sliding layers are transformers' static ones.

    Raises:
        SpecError: the strategy cannot be read or built, or not for this model.
        MissingExtra: an optional dependency is not installed.
    """
    strategy = parse(spec, cache_config) if isinstance(spec, str) else spec
    if strategy.layout.name == "static" and strategy.layout.limit is None:
        if max_cache_len is None:
            raise SpecError(
                f"{strategy}: 'static' needs max_cache_len, as an argument of build or of the spec"
            )
        strategy = strategy.replace(layout=type(strategy.layout)(max_cache_len=max_cache_len))
    stats, place = Stats(), strategy.placement.open()
    if strategy.layout.is_compileable(strategy):
        theirs = transformers.StaticCache(config=config, max_cache_len=strategy.layout.limit).layers
        ours = OurStaticLayer if strategy.codec.name == "exact" else StaticCodedLayer
        layers = [ours(strategy, stats) if type(x) is StaticLayer else x for x in theirs]
    else:
        theirs = transformers.DynamicCache(config=config).layers
        pinned = tuple(i for i, layer in enumerate(theirs) if type(layer) is DynamicLayer)
        turn = _turns(strategy, config, pinned) if strategy.retention.first and pinned else {}
        layers = [_layer(x, strategy, place, stats, turn.get(i)) for i, x in enumerate(theirs)]
    _check_known(theirs, strategy, config)
    # transformers' static windows are all that an exact static cache of a sliding model needs
    served = (Layer, StaticLayer if strategy.codec.name == "exact" else OurStaticLayer)
    if not any(isinstance(layer, served) for layer in layers):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "none"
        raise SpecError(
            f"{strategy}: {type(config).__name__} has no attention layer it could serve: {kinds}"
        )
    return Cache(layers, strategy, stats)


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
    strategy: Strategy, config: PreTrainedConfig, pinned: tuple[int, ...]
) -> dict[int, Turn]:
    text = config.get_text_config(decoder=True)
    if text is not config and positions_depend_on_images(config):
        raise SpecError(
            f"{strategy}: behind an image, positions of {type(config).__name__} are not columns, "
            "and pinned keys would stand in the future; for prompts of text alone build from "
            "config.get_text_config(), else use 'window'"
        )
    return turns(text, pinned)


def _layer(theirs: Any, strategy: Strategy, place: Any, stats: Stats, turn: Turn | None) -> Any:
    """Our layer in the place of transformers'; where that is not plain attention, it stays."""
    if type(theirs) is DynamicLayer:
        return Layer(strategy, place, stats, turn)
    if type(theirs) is DynamicSlidingWindowLayer:
        window = strategy.replace(retention=Window(length=theirs.sliding_window))
        return Layer(window, place, stats, is_sliding=True)
    return theirs


def is_ours(name: Any) -> bool:
    """Whether a `cache_implementation` is left to us: any text transformers does not know."""
    return isinstance(name, str) and (name.startswith(PREFIX) or name not in THEIR_NAMES)


def _storages(root: object) -> dict[int, int]:
    """Bytes by storage of all tensors reachable through containers and attributes."""
    found: dict[int, int] = {}
    todo, met = [root], set()
    while todo:
        x = todo.pop()
        if id(x) in met or isinstance(x, (str, bytes, type)):
            continue
        met.add(id(x))
        if isinstance(x, torch.Tensor):
            storage = x.untyped_storage()
            found[storage._cdata] = storage.nbytes()
        elif isinstance(x, dict):
            todo.extend(x.values())
        elif isinstance(x, (list, tuple, set)):
            todo.extend(x)
        elif hasattr(x, "__dict__") and not callable(x):
            todo.extend(vars(x).values())
    return found
