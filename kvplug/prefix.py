"""Prefixes of prompts from a store: what `generate` need not compute again.

The contract: **warm equals cold, bit for bit**. A call with a store computes its prompt in chunks
of the same tokens, whatever is stored, row by row; after each it encodes all of it, the newest
tokens too, and only then goes on. So a chunk that was computed and one that was loaded leave the
same bytes, and an answer does not depend on who was first. What does not fill a chunk, and never
less than the codec's tail and the last token, is computed by transformers as ever.

    tokens of a row   | chunk 0 | chunk 1 | ... | chunk M - 1 |  rest  |
                        from the store, or computed and stored   computed, all rows at once

Padding of shorter rows moves behind the chunks, whose columns then are tokens in all rows.
"""

from __future__ import annotations

import copy
import logging
import os
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache as once
from typing import TYPE_CHECKING, Any

import torch

from . import compat
from . import store as stores
from .errors import SpecError, unknown
from .layers.state import join, part
from .retention.full import Full

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel

    from .cache import Cache
    from .store import Store
    from .strategy import Strategy

logger = logging.getLogger("kvplug")

CHUNK = 256  # tokens; rounded up to whole blocks of every layer
WAITING = 2  # chunks that are computed and not written yet: the next one waits
OPTIONS = ("store", "salt", "chunk", "verify", "model_id")
VERIFY = ("sampled", "full")
# what a model may be given beside ids and cache: anything else may change keys and values
ALLOWED = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "return_dict"}
# rotations whose angles depend on how long the whole sequence is
BY_LENGTH = {"dynamic", "longrope"}


@dataclass(frozen=True, slots=True)
class Reuse:
    """What a cache was told of its store: the entries OPTIONS of `cache_config`.

    store: where chunks are kept
    salt: what keys hold beside the tokens; who has another finds nothing of these
    chunk: tokens that are stored together, and found again as a whole
    verify: "full" where weights are edited in place through `.data`, which samples may not show
    model_id: a name for weights that cannot be read, as on the meta device
    """

    store: Store
    salt: str
    chunk: int = CHUNK
    verify: str = "sampled"
    model_id: str | None = None

    def check(self, strategy: Strategy) -> None:
        """Raise SpecError for a strategy whose prefixes cannot be told apart from what follows."""
        if not isinstance(strategy.retention, Full):
            raise SpecError(
                f"{strategy}: a store keeps prefixes whole, and {strategy.retention.name!r} drops "
                "what it was not asked for yet: use retention 'full' with a store"
            )
        if strategy.layout.reserves:
            raise SpecError(
                f"{strategy}: a store fills caches that grow, and {strategy.layout.name!r} has "
                "room at addresses of its own: use layout 'growing' with a store"
            )


def told(cache_config: Mapping[str, Any] | None) -> tuple[Reuse | None, Any]:
    """The store that a `cache_config` names, if any, and what is left for the stages.

    Raises SpecError for options without a store or of no meaning, StoreError for the store itself.
    """
    if not hasattr(cache_config, "items"):
        return None, cache_config
    mine = {name: x for name, x in cache_config.items() if name in OPTIONS}
    rest = {name: x for name, x in cache_config.items() if name not in OPTIONS}
    if not mine:
        return None, cache_config
    if mine.get("store") is None:
        raise SpecError(f"cache_config has {', '.join(map(repr, mine))} and no 'store'")
    mine["store"] = stores.open(mine["store"])
    mine["salt"] = mine.get("salt") or mine["store"].salt
    reuse = Reuse(**mine)
    if type(reuse.chunk) is not int or reuse.chunk < 1:
        raise SpecError(f"chunk={reuse.chunk!r}: a number of tokens, at least 1")
    if reuse.verify not in VERIFY:
        raise SpecError(unknown("verify", reuse.verify, list(VERIFY)))
    stores.keys.tag(reuse.salt)  # one that is no text is an error now
    return reuse, rest or None


def fill(
    model: PreTrainedModel,
    cache: Cache,
    ids: Tensor,
    config: GenerationConfig,
    kwargs: dict[str, Any],
    prefill: Callable[..., Any],
) -> Tensor:
    """Fill an empty cache with the whole chunks of a prompt; return the ids that are left.

    Args:
        model, ids [B, L], config, kwargs: as transformers' `_prefill` has them. Where padding
            moves, `attention_mask` and `position_ids` of kwargs are replaced.
        cache: one with `reuse`.
        prefill: transformers' own method, bound.

    Where a store cannot serve the call, nothing happens, counted and logged with the reason.
    """
    reuse = cache.reuse
    if (reason := _obstacle(model, cache, ids, config, kwargs)) is not None:
        fall_back(reuse, reason)
        return ids
    mask = kwargs.get("attention_mask")
    shown = torch.ones_like(ids) if mask is None else mask
    rows = [row[on.bool()] for row, on in zip(ids, shown, strict=True)]
    plan = _Plan(model, cache, reuse)
    M = plan.chunks(min(map(len, rows)))
    if not M:
        return ids
    cache.set_padding(torch.ones_like(ids))
    n = plan.end(M)
    own = [tuple(row[:n].tolist()) for row in rows]
    filled: dict[tuple[int, ...], Cache] = {}
    for row in own:
        if row not in filled:  # beams are one prompt, computed once
            filled[row] = cache if len(own) == 1 else _twin(cache, n)
            plan.fill(filled[row], row, config, kwargs, prefill)
    if len(own) > 1:
        twins = [filled[row] for row in own]
        if len({tuple(x.strategy.codec for x in twin.layers) for twin in twins}) > 1:
            cache.set_padding(shown)
            cache.reused_tokens = 0
            fall_back(reuse, "rows whose keys want different widths")
            return ids
        _stack(cache, twins)
    return _behind(n, rows, ids, kwargs)[:, n:]


def fall_back(reuse: Reuse, reason: str) -> None:
    """Count a call that goes the plain way, and say so the first time."""
    reuse.store.count("fallbacks", reason=reason)
    _say(reason)


@once
def _say(reason: str) -> None:
    logger.warning("kvplug: a call makes no use of its store (%s): all is computed", reason)


def _obstacle(
    model: PreTrainedModel, cache: Cache, ids: Tensor, config: GenerationConfig, kwargs: dict
) -> str | None:
    """Why a store cannot serve a call, in a few words; None where it can."""
    text = model.config.get_text_config(decoder=True)
    kinds = {type(x).__name__ for x in cache.layers if not getattr(x, "by_chunks", False)}
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    # what was made of pictures is a dict, empty where there are none
    empty = {name for name, x in kwargs.items() if isinstance(x, dict) and not x}
    given = {name for name, x in kwargs.items() if x is not None and x is not False} - empty
    other = sorted(given - ALLOWED - set(compat.CACHE_ARGUMENTS))
    for obstacle, reason in (
        (model.config.is_encoder_decoder, "encoder-decoder"),
        (model.training, "training"),
        (config.is_assistant, "assistant"),
        (config.prefill_chunk_size, "prefill_chunk_size"),
        (config.output_attentions, "attentions returned"),
        (config.output_hidden_states, "hidden states returned"),
        (other, f"argument {other[0]}" if other else ""),
        (ids.dim() != 2, "ids of more than two dimensions"),
        (cache.get_seq_length(), "a cache in use"),
        (distributed and torch.distributed.get_world_size() > 1, "several processes in one call"),
        (kinds, f"layers of kind {', '.join(sorted(kinds))}"),
        (getattr(text, "cross_attention_layers", ()), "cross-attention"),
        (BY_LENGTH & compat.rope_types(text), "rotation by the length of the prompt"),
    ):
        if obstacle:
            return reason
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is None:
        mask = torch.ones_like(ids)
    if mask.shape != ids.shape or (mask.diff(dim=-1) < 0).any() or not mask[:, -1].all():
        return "a mask with holes"
    if positions is not None:
        plain = positions.shape[-1] == ids.shape[-1]
        if not plain or ((positions != _positions(mask)) & mask.bool()).any():
            return "own position ids"
    if not mask.all():
        if any(layer.is_sliding for layer in cache.layers):
            return "padding beside sliding windows"
        if positions is None:
            return "padding, and a model without position ids"
        if cache.outlives:
            return "padding, and a cache that outlives the call"
    return None


def _positions(mask: Tensor) -> Tensor:
    """[B, T]: the place of each token among those of its row; of mask [B, T]."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


class _Plan:
    """How prompts of one call are cut, and how a cache of one row is filled."""

    def __init__(self, model: PreTrainedModel, cache: Cache, reuse: Reuse) -> None:
        self.model, self.cache, self.reuse = model, cache, reuse
        codecs = [layer.strategy.codec for layer in cache.layers]
        self.chunk = reuse.chunk
        for block in {codec.block for codec in codecs}:  # whole blocks of each layer
            self.chunk = -(-self.chunk // block) * block
        self.tail = max(1, *(codec.tail for codec in codecs))
        self.first = max(layer.before_blocks for layer in cache.layers)
        self.root = stores.keys.root(
            model, cache.strategy, self.chunk, reuse.salt, reuse.verify, reuse.model_id
        )
        self.devices = compat.layer_devices(model, len(cache.layers))

    def chunks(self, length: int) -> int:
        """Chunks of a row of so many tokens: what is left is never less than the tail."""
        return max(0, length - self.first - self.tail) // self.chunk

    def end(self, chunks: int) -> int:
        """The column after so many chunks."""
        return self.first + chunks * self.chunk

    def fill(
        self,
        own: Cache,
        row: tuple[int, ...],
        config: GenerationConfig,
        kwargs: dict[str, Any],
        prefill: Callable[..., Any],
    ) -> None:
        """Load what is stored of a row [n], whole chunks, and compute and store the others."""
        # the first tokens belong to the first chunk
        begin = stores.keys.chain(self.root, row[: self.first], max(1, self.first))
        keys = stores.keys.chain(begin[0] if begin else self.root, row[self.first :], self.chunk)
        done = self._load(own, keys)
        ids = torch.tensor([row], device=self.model.device)
        # a thread that takes a core from torch's makes each of them wait for it
        spare = ids.device.type != "cpu" or torch.get_num_threads() < _cores()
        with stores.behind(self.reuse.store.save, WAITING if spare else 0) as save:
            for i in range(done, len(keys)):
                a, b = self.end(i) if i else 0, self.end(i + 1)
                of_chunk = dict(kwargs) | {"attention_mask": torch.ones_like(ids[:, :b])}
                compat.put_cache(of_chunk, self.cache, own)
                if (positions := kwargs.get("position_ids")) is not None:
                    columns = torch.arange(a, b, device=ids.device)
                    of_chunk["position_ids"] = columns.expand(*positions.shape[:-2], 1, -1)
                if "logits_to_keep" in kwargs:  # of which a chunk needs none
                    of_chunk["logits_to_keep"] = torch.arange(0, device=ids.device)
                with _sealing(own):
                    prefill(ids[:, a:b], config, of_chunk)
                    for layer in own.layers:
                        layer.seal()
                save([keys[i]], [chunk_of(own, a, b)], after=keys[:i])

    def _load(self, own: Cache, keys: list[bytes]) -> int:
        """Fill an empty cache with the chunks that are stored; how many."""
        store = self.reuse.store
        chunks = list(store.load(keys))
        if not chunks:
            return 0
        n = self.end(len(chunks))
        try:
            load_chunks(own, chunks, n, self.devices)
        except Exception as e:  # a record of these keys that is of no use: as if it were not there
            own.reset()
            reason = type(e).__name__
            store.count("misses", len(chunks), reason=reason)
            logger.warning("kvplug: chunks that were loaded do not fit: %s: %s", reason, e)
            return 0
        store.count("reused_tokens", n)
        self.cache.reused_tokens += n
        return len(chunks)


def _cores() -> int:
    """Cores that this process may run on; a scheduler may have given it fewer than there are."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def chunk_of(cache: Cache, begin: int, end: int) -> dict[str, Tensor]:
    """Columns begin:end, the newest, of a sealed cache of one row.

    Layers whose tensors are alike are stacked: `NUMBERS.NAME` [layers, 1, H, N, ...].
    """
    alike: dict[tuple, list[tuple[int, dict[str, Tensor]]]] = {}
    for i, layer in enumerate(cache.layers):
        own = layer.chunk(begin, end)
        kind = tuple((name, x.shape, x.dtype) for name, x in own.items())
        alike.setdefault(kind, []).append((i, own))
    stacked: dict[str, Tensor] = {}
    for layers in alike.values():
        numbers = ",".join(str(i) for i, _ in layers)
        for name in layers[0][1]:
            stacked[f"{numbers}.{name}"] = torch.stack([own[name] for _, own in layers])
    return stacked


def load_chunks(
    cache: Cache, chunks: list[dict[str, Tensor]], end: int, devices: list[torch.device]
) -> None:
    """Fill an empty cache of one row with chunks of `chunk_of`, `end` columns in all."""
    whole = join(chunks, axis=3)
    for numbers in dict.fromkeys(name.partition(".")[0] for name in whole):
        of_these = part(whole, numbers)
        for j, i in enumerate(map(int, numbers.split(","))):
            own = {name: x[j] for name, x in of_these.items()}
            cache.layers[i].load_chunks(own, end, devices[i])
    if {int(layer.get_seq_length()) for layer in cache.layers} != {end}:
        raise ValueError("layers are missing")


@contextmanager
def _sealing(cache: Cache) -> Iterator[None]:
    """All that comes is encoded at once, by its own queries; as ever again where that fails."""
    for layer in cache.layers:
        layer.sealing = True
    try:
        yield
    finally:
        for layer in cache.layers:
            layer.sealing = False


def _twin(cache: Cache, tokens: int) -> Cache:
    """An empty cache built alike, for one row of so many; what it does is counted by the first."""
    shared = (cache._stats, cache.reuse.store)
    twin = copy.deepcopy(cache, {id(x): x for x in shared})
    twin.reset()
    twin.expect(tokens)
    return twin


def _stack(cache: Cache, rows: list[Cache]) -> None:
    """Make an empty cache hold the rows of several that hold as many columns."""
    for i, layer in enumerate(cache.layers):
        states = [row.layers[i].state() for row in rows]
        layer.load_state(
            {
                name: torch.cat([s[name] for s in states]) if isinstance(x, torch.Tensor) else x
                for name, x in states[0].items()
            }
        )


def _behind(n: int, rows: list[Tensor], ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Ids [B, L] whose padding, of left-padded rows, stands behind the first n tokens.

    Mask and positions of kwargs are replaced by those of the new columns.
    """
    mask = kwargs.get("attention_mask")
    if mask is None or mask.all():
        return ids
    L, moved = ids.shape[1], []
    for row, old in zip(rows, ids, strict=True):
        moved.append(torch.cat((row[:n], old[: L - len(row)], row[n:])))
    padding = L - mask.sum(-1, keepdim=True)
    column = torch.arange(L, device=mask.device)
    kwargs["attention_mask"] = ((column < n) | (column >= n + padding)).to(mask.dtype)
    positions = _positions(kwargs["attention_mask"])
    planes = kwargs["position_ids"].shape[:-2]
    kwargs["position_ids"] = positions.expand(*planes, *positions.shape)
    return torch.stack(moved)
