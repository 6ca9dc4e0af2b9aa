"""The cache object: transformers' `Cache` over kvplug's layers, and what it holds in bytes."""

from __future__ import annotations

import copy
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import torch
import transformers

from . import bias
from .compat import (
    KNOWN_LAYERS,
    THEIR_NAMES,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    StaticLayer,
)
from .errors import CacheOverflow, Mismatch, SpecError
from .layers.base import AttentionLayer, Slot
from .layers.combined import with_state
from .layers.layout import Growing
from .layers.probe import positions_depend_on_images
from .layers.rotation import turns
from .layers.state import attributes, nest, part, set_attributes
from .retention.base import Scored
from .retention.full import Full
from .spec import PREFIX, Strategy, parse
from .stats import Stats

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from transformers import PreTrainedConfig

    from .layers.rotation import Turn
    from .layers.state import State


# transformers' layers of plain attention, with and without a linear-attention state beside it
FULL = (DynamicLayer, LinearAttentionAndFullAttentionLayer)
SLIDING = (DynamicSlidingWindowLayer, LinearAttentionAndSlidingWindowAttentionLayer)


FORMAT = 1  # of `state_dict`; another where names or meanings change


class Cache(transformers.Cache):
    """A cache built from a strategy: all that transformers' `Cache` does, and what it holds."""

    def __init__(
        self, layers: list, strategy: Strategy, stats: Stats, unpadded_only: str | None = None
    ) -> None:
        super().__init__(layers=layers)
        self.strategy, self._stats = strategy, stats
        self._unpadded_only = unpadded_only  # why no batch with padding can be served
        self.may_grow = False  # whether `generate` may: it chose the length of a static layout

    def nbytes(self) -> int:
        """Bytes of all tensors reachable from here, shared storage once, reserved room included."""
        return sum(_storages(self).values())

    def held(self, layer_idx: int = 0) -> int:
        """Tokens of a layer that the next query can see; `get_seq_length` counts those seen."""
        layer = self.layers[layer_idx]
        ours = isinstance(layer, AttentionLayer)
        return layer.held() if ours else int(layer.get_seq_length())

    def _ours(self) -> Iterator[AttentionLayer]:
        return (layer for layer in self.layers if isinstance(layer, AttentionLayer))

    def stats(self) -> dict:
        """What ran: calls per kernel, dense copies by cause, blocks encoded; and the full spec."""
        return {"strategy": repr(self.strategy)} | self._stats.as_dict()

    def state_dict(self) -> dict[str, Tensor | int | float | bool | str | None]:
        """All that this cache holds: plain tensors, and numbers that JSON has.

        Encoded blocks are as they are encoded. Tensors share memory with the cache: who goes on
        using it clones them. What counts what ran (`stats`) is not among it.
        """
        state: State = {"format": FORMAT, "strategy": repr(self.strategy)}
        for i, layer in enumerate(self.layers):
            own = layer.state() if isinstance(layer, AttentionLayer) else attributes(layer)
            state |= nest(f"layers.{i}", own)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold what another cache of this strategy and model has held, copied.

        Tensors may come from anywhere, a file for instance; layers go on where theirs are.

        Raises Mismatch, and changes nothing, where the state is of another strategy, number of
        layers or format.
        """
        numbers = {int(name.split(".")[1]) for name in state if name.startswith("layers.")}
        mine = FORMAT, repr(self.strategy), len(self.layers)
        theirs = state.get("format"), state.get("strategy"), max(numbers, default=-1) + 1
        for what, a, b in zip(
            ("format", "strategy", "number of layers"), mine, theirs, strict=True
        ):
            if a != b:
                raise Mismatch(
                    f"this cache has {what} {a!r} and cannot hold a state with {what} {b!r}"
                )
        for i, layer in enumerate(self.layers):
            own = part(state, f"layers.{i}")
            if isinstance(layer, AttentionLayer):
                layer.load_state(own)
            else:
                set_attributes(layer, own)

    @property
    def is_compileable(self) -> bool:
        """Whether a decode step has one shape for all lengths, empty room included.

        Asked of our layers alone: where it is False transformers leaves out masks that hide nothing
        but empty room, and a linear-attention state that grows to record the past has none.
        """
        return all(layer.is_compileable for layer in self._ours())

    def set_padding(self, attention_mask: Tensor | None) -> None:
        """Tell which tokens are left padding: attention_mask [B, T], 0 for padding.

        `generate` does this. In a loop of your own, do it before the first forward pass where
        retention keeps first tokens or picks some; others do not need it.

        Raises SpecError where the model cannot have padding with this strategy.
        """
        if attention_mask is None or attention_mask.dim() != 2:
            return
        if isinstance(self.strategy.retention, Scored) and (attention_mask.diff(dim=-1) < 0).any():
            raise SpecError(
                f"{self.strategy}: this attention_mask has holes: {self.strategy.retention.name!r} "
                "moves tokens together, and serves left padding alone"
            )
        if self._unpadded_only and not attention_mask.all():
            raise SpecError(self._unpadded_only)
        padding = (attention_mask.long().cumsum(-1) == 0).sum(-1)  # [B]
        for layer in self._ours():
            layer.set_padding(padding)

    def ensure_room(self, tokens: int) -> None:
        """See to it that a call that may reach `tokens` in all finds room.

        `generate` does this before the model runs. A static cache whose length it has chosen itself
        grows; where you have said `max_cache_len`, that holds, and CacheOverflow is raised.
        """
        limit = self.strategy.layout.limit
        if limit is None or tokens <= limit:
            return
        if not self.may_grow:
            raise CacheOverflow(
                f"static cache of max_cache_len={limit} holds {int(self.get_seq_length())} tokens "
                f"and cannot take the {tokens} that this call may reach; build it with "
                f"max_cache_len >= {tokens}, or let it grow({tokens}), or ask for fewer new tokens"
            )
        self.grow(tokens)

    def grow(self, max_cache_len: int) -> None:
        """Reserve room for `max_cache_len` tokens in all; nothing to do where there is as much.

        What is held stays as it is, at a new address, so that compiled decoding is compiled once
        more. Layer by layer, so that no more than one is there twice. What fails changes nothing.

        Raises:
            CacheOverflow: a layer that is transformers' own has a fixed length.
        """
        limit = self.strategy.layout.limit
        if limit is None or max_cache_len <= limit:
            return
        fixed = {
            type(layer).__name__
            for layer in self.layers
            if isinstance(layer, StaticLayer) and not isinstance(layer, AttentionLayer)
        }
        if fixed:
            raise CacheOverflow(
                f"static cache of max_cache_len={limit} cannot grow to {max_cache_len}: layers of "
                f"transformers' own have a fixed length: {', '.join(sorted(fixed))}; build it with "
                f"max_cache_len >= {max_cache_len}"
            )
        limited = [layer for layer in self._ours() if layer.strategy.layout.limit]
        try:
            for layer in limited:
                layer.resize(max_cache_len)
        except BaseException:
            for layer in limited:
                layer.resize(limit)
            raise
        self.strategy = self.strategy.with_room(max_cache_len)

    def check_positions(self, position_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Refuse positions that sinks would be turned to wrongly, as `generate` does.

        Args:
            position_ids: [B, T] or [N, B, T], of a prompt's columns; in each row and each of the N
                they must run on by one from its first token to its last.
            attention_mask: [B, T] or longer to the left, 0 for columns that hold no token.

        Raises SpecError.
        """
        sinks = (layer.sinks for layer in self._ours())
        if not any(rotation for x in sinks if x is not None for rotation in x.turn):
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

    def check_layers(self, config: PreTrainedConfig) -> None:
        """Raise Mismatch where a model of this config has another number of layers."""
        theirs = len(transformers.DynamicCache(config=config.get_text_config(decoder=True)).layers)
        if theirs != len(self.layers):
            raise Mismatch(
                f"this cache has {len(self.layers)} layers and {type(config).__name__} has "
                f"{theirs}: build one with the config of this model"
            )

    def deactivate_past_recording(self) -> None:
        """End `activate_past_recording`: what it held back is encoded, or dropped, as ever."""
        for layer in self.layers:
            if hasattr(layer, "deactivate_past_recording"):
                layer.deactivate_past_recording()
            elif hasattr(layer, "record_past"):  # transformers' own, which `crop` has restricted
                layer.record_past = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens to a layer (see `Layer.update`) while the next layer fetches its blocks.

        Raises Mismatch where the model has more layers than this cache.
        """
        if layer_idx >= len(self.layers):
            raise Mismatch(
                f"this cache has {len(self.layers)} layers and the model asks for number "
                f"{layer_idx + 1}: build one with the config of this model"
            )
        if not self.strategy.placement.on_device:
            following = self.layers[(layer_idx + 1) % len(self.layers)]
            if isinstance(following, AttentionLayer):
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

    Layers of sliding-window attention keep the model's window and take codec and placement; under
    a compilable static layout they stay in full precision. Layers of cross-attention to images
    keep all of these, and are transformers' own under such a layout. Where a layer holds attention
    and a linear-attention state, the attention is served. Linear-attention, conv, indexed and
    dummy layers are transformers' own.

    Raises:
        SpecError: the strategy cannot be read or built, or not for this model.
        MissingExtra: an optional dependency is not installed.
    """
    strategy = parse(spec, cache_config) if isinstance(spec, str) else spec
    strategy = strategy.resolve(config, max_cache_len=max_cache_len)
    stats, place = Stats(), strategy.placement.open()
    text = config.get_text_config(decoder=True)
    never, unpadded_only = bias.refusals(text, strategy)
    if never:
        raise SpecError(never)
    theirs = transformers.DynamicCache(config=config).layers
    _check_known(theirs, strategy, config)
    # what we do not serve stays transformers' own, of the kind that goes with the layout
    stay = theirs
    if strategy.layout.is_compileable(strategy):
        stay = transformers.StaticCache(config=config, max_cache_len=strategy.layout.limit).layers
    # Mllama's: their tokens are those of images
    crossed = getattr(text, "cross_attention_layers", ())
    turn = _turns(strategy, config, theirs, crossed)
    layers = []
    for i, layer in enumerate(theirs):
        own, window = strategy.at(i, len(theirs)), getattr(layer, "sliding_window", None)
        if i in crossed:
            if stay is not theirs:  # of transformers' own, one that has the columns it is given
                layers.append(layer)
                continue
            own = own.replace(retention=Full(), layout=Growing())
        slot = Slot(own, place, stats, window, turn.get(i), strategy.is_coded)
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
        if not served[i]:
            raise SpecError(
                f"{strategy}: {codec} cannot serve layer {i} of {type(config).__name__}, a "
                f"{type(layers[i]).__name__}"
            )
    return Cache(layers, strategy, stats, unpadded_only)


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


def _reduce(cache: Cache) -> tuple[Any, tuple[dict[str, Any]]]:
    """What goes to another process is a copy.

    torch shares the memory of tensors it sends, and a cache writes in place: two processes that
    went on with the same one would overwrite each other's tokens.
    """
    return _restore, (vars(copy.deepcopy(cache)),)


def _restore(state: dict[str, Any]) -> Cache:
    cache = Cache.__new__(Cache)
    vars(cache).update(state)
    return cache


ForkingPickler.register(Cache, _reduce)
