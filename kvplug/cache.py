"""The cache object: transformers' `Cache` over kvplug's layers, and what it holds in bytes."""

from __future__ import annotations

import copy
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from . import saved
from .compat import StaticLayer, cache_layers
from .errors import CacheOverflow, Mismatch, SpecError
from .layers.base import AttentionLayer
from .layers.state import attributes, nest, part, set_attributes
from .retention.base import Scored

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedConfig

    from .layers.state import State
    from .prefix import Reuse
    from .stats import Stats
    from .strategy import Strategy

FORMAT = 1  # of `state_dict`; another where names or meanings change


class Cache(transformers.Cache):
    """A cache built from a strategy: all that transformers' `Cache` does, and what it holds."""

    def __init__(
        self,
        layers: list,
        strategy: Strategy,
        stats: Stats,
        unpadded_only: str | None = None,
        model: dict[str, Any] | None = None,
    ) -> None:
        transformers.Cache.__init__(self, layers=layers)
        self.strategy, self._stats = strategy, stats
        self.model = model or {}  # what tells its kind from others, for `save`
        self._unpadded_only = unpadded_only  # why no batch with padding can be served
        self.chosen: str | None = None  # why `auto` took this strategy
        self.may_grow = False  # whether `generate` may: it chose the length of a static layout
        self.reuse: Reuse | None = None  # the store that prompts are found in, and left in
        self.outlives = True  # whether it is seen after the call of `generate` that fills it
        self.reused_tokens = 0

    def nbytes(self) -> int:
        """Bytes of all tensors reachable from here, shared storage once, reserved room included."""
        return nbytes(self)

    def held(self, layer_idx: int = 0) -> int:
        """Tokens of a layer that the next query can see; `get_seq_length` counts those seen."""
        layer = self.layers[layer_idx]
        ours = isinstance(layer, AttentionLayer)
        return layer.held() if ours else int(layer.get_seq_length())

    def _ours(self) -> Iterator[AttentionLayer]:
        return (layer for layer in self.layers if isinstance(layer, AttentionLayer))

    def stats(self) -> dict:
        """What ran: calls per kernel, dense copies by cause, blocks encoded; and the full spec.

        `encoders`: blocks that `numba`, a compiled loop, or plain `torch` has encoded.
        `blocks_for_queries`: those of them whose keys were rounded for queries of attention.
        `swinging`: whether keys of some layer swung within a block, and may lose more than those of
        other models. `widened`: codecs that such layers have where fewer bits were asked for, with
        the numbers of these layers. `chosen`: why `auto` took it; None where the caller has named
        it. `retention`, of methods that choose by content: the `budget`, the `evictions` of a
        layer, and the tokens `asked` and `kept` by layer and head (None of a layer that chooses
        nothing). `reused_tokens`: those of all rows that came from a store.
        """
        told = {"strategy": repr(self.strategy), "chosen": self.chosen} | self._stats.as_dict()
        told["widened"] = {}
        for i, layer in enumerate(self.layers):
            if isinstance(layer, AttentionLayer):
                for codec in layer.codecs() - {layer.slot.strategy.codec}:
                    told["widened"].setdefault(str(codec), []).append(i)
        told["reused_tokens"] = self.reused_tokens
        if isinstance(self.strategy.retention, Scored):
            ours = [x if isinstance(x, AttentionLayer) else None for x in self.layers]
            told["retention"] = {
                "budget": self.strategy.retention.budget,
                "evictions": max(x.evictions for x in ours if x is not None),
                "asked": [None if x is None else x.asked() for x in ours],
                "kept": [None if x is None else x.kept() for x in ours],
            }
        return told

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
        layers = max(numbers, default=-1) + 1
        self.check_state(state.get("format"), state.get("strategy"), layers)
        for i in range(layers):
            self.load_layer(i, part(state, f"layers.{i}"))

    def check_state(self, format: int | None, strategy: str | None, layers: int) -> None:
        """Raise Mismatch where a state of this kind is not one of this cache."""
        mine = FORMAT, repr(self.strategy), len(self.layers)
        for what, a, b in zip(
            ("format", "strategy", "number of layers"),
            mine,
            (format, strategy, layers),
            strict=True,
        ):
            if a != b:
                raise Mismatch(
                    f"this cache has {what} {a!r} and cannot hold a state with {what} {b!r}"
                )

    def load_layer(self, layer_idx: int, state: State) -> None:
        """Hold in one layer what stands in `state_dict` under its number, copied."""
        layer = self.layers[layer_idx]
        if isinstance(layer, AttentionLayer):
            layer.load_state(state)
        else:
            set_attributes(layer, state)

    def save(self, folder: str | os.PathLike) -> None:
        """Write all that is held to a folder, for `kvplug.load`: safetensors and JSON.

        A cache that is there already is replaced in one step. One process writes to a folder at a
        time. Of the tokens only keys and values are held: keep the tokens themselves, and the mask
        of a padded batch, beside it.

        Raises SpecError where a layer has no state that can be written.
        """
        state = self.state_dict()
        head = {name: state[name] for name in ("format", "strategy")}
        head |= {"model": self.model, "may_grow": self.may_grow}
        layers = [part(state, f"layers.{i}") for i in range(len(self.layers))]
        saved.write(Path(folder), head, layers)

    @property
    def is_compileable(self) -> bool:
        """Whether a decode step has one shape for all lengths, empty room included.

        Asked of our layers alone: where it is False transformers leaves out masks that hide nothing
        but empty room, and a linear-attention state that grows to record the past has none.
        """
        return all(layer.is_compileable for layer in self._ours())

    def set_padding(self, attention_mask: Tensor | None) -> None:
        """Tell which tokens are left padding: attention_mask [B, T], 0 for padding.

        T columns are the prompt, as `expect` wants to know. `generate` does this. In a loop of your
        own, do it before the first forward pass where retention keeps first tokens or picks some;
        others do not need it.

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
        self.expect(attention_mask.shape[1])

    def expect(self, tokens: int) -> None:
        """Tell how many tokens there are when the prompt has come, those seen before included.

        Retention that keeps what the prompt's end asks for waits until then, in whatever chunks
        the prompt comes. `generate` does this; who feeds chunks in a loop of their own, and does
        not, has it choose after each. Where it has chosen for an earlier prompt, a warning says
        that what this one asks for may be gone, and `stats()` counts it (`other_questions`).
        """
        retention, chosen = self.strategy.retention, any(x.evictions for x in self._ours())
        more = tokens - int(self.get_seq_length())  # the last token of an answer has not been seen
        if chosen and retention.for_question and more > 1:
            self._stats.ask_again(retention)
        for layer in self._ours():
            layer.expect(tokens)

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
        theirs = cache_layers(config.get_text_config(decoder=True))
        if theirs != len(self.layers):
            raise Mismatch(
                f"this cache has {len(self.layers)} layers and {type(config).__name__} has "
                f"{theirs}: build one with the config of this model"
            )

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As in transformers; of layers that choose by content, the sizes of the longest.

        Each has as many tokens as it chose, and one mask serves them all: of that which is too long
        `attention/mask.py` takes the last columns.
        """
        longest = [x for x in self._ours() if isinstance(x.strategy.retention, Scored)]
        if layer_idx < len(self.layers) and self.layers[layer_idx] in longest:
            return max(x.get_mask_sizes(query_length) for x in longest)
        return super().get_mask_sizes(query_length, layer_idx)

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


def nbytes(root: object) -> int:
    """Bytes of all tensors reachable from an object, shared storage once."""
    return sum(_storages(root).values())


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


def send(cache: Cache) -> tuple[Any, tuple[type, dict[str, Any]]]:
    """What goes to another process is a copy.

    torch shares the memory of tensors it sends, and a cache writes in place: two processes that
    went on with the same one would overwrite each other's tokens. A store stays where it is.
    """
    return _received, (type(cache), vars(copy.deepcopy(cache)) | {"reuse": None})


def _received(kind: type[Cache], state: dict[str, Any]) -> Cache:
    cache = kind.__new__(kind)
    vars(cache).update(state)
    return cache


ForkingPickler.register(Cache, send)
