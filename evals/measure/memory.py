"""Bytes, without asking the cache: a walk over what it holds."""

from __future__ import annotations

import gc
from statistics import fmean
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import psutil
import torch

SPARE = 0.9  # of the free memory that caches may take


def held_bytes(root: Any) -> int:
    """Count the bytes of every tensor and array reachable from `root`, each address once.

    Reachable is what the garbage collector can reach: attributes, slots, containers, closures,
    tensors inside tensor subclasses; but not modules, classes or a function's globals, which a
    cache does not own, nor the model. A tensor counts as its whole storage, since that is what it
    keeps alive. Bytes are a union of address ranges, so that a view, an alias and a numpy window
    onto a tensor add nothing.
    """
    spans: list[tuple[str, int, int]] = []  # device, first byte, one past the last
    todo, seen = [root], set()
    while todo:
        thing = todo.pop()
        foreign = isinstance(thing, (type, ModuleType, BuiltinFunctionType, torch.nn.Module))
        if id(thing) in seen or foreign:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            todo += vars(thing).values()
            start, size = _storage(thing)
            spans.append((str(thing.device), start, start + size))
        elif isinstance(thing, np.ndarray):
            start, end = np.lib.array_utils.byte_bounds(thing)
            spans.append(("cpu", start, end))
            todo.append(thing.base)
        elif isinstance(thing, FunctionType):
            todo += [thing.__closure__, thing.__defaults__, thing.__kwdefaults__]
        elif isinstance(thing, MethodType):
            todo += [thing.__self__, thing.__func__]
        else:
            todo += gc.get_referents(thing)

    total, device, reached = 0, "", 0
    for where, start, end in sorted(spans):
        if where != device:
            device, reached = where, 0
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


class DishonestBytes(AssertionError):
    """A cache claims other bytes than it holds."""


def checked_bytes(cache: Any) -> int:
    """Return the bytes a walk finds; raise if the cache says otherwise of itself (transformers'
    caches say nothing).
    """
    held = held_bytes(cache)
    if hasattr(cache, "nbytes") and (claimed := cache.nbytes()) != held:
        raise DishonestBytes(
            f"nbytes() claims {claimed:,} bytes, a walk over the cache's tensors finds {held:,}"
        )
    return held


def account(cache: Any) -> dict[str, Any]:
    """Return what a cache holds and says of itself, for the `stats` of a row: `bytes_held`,
    `tokens_held` a head, the mean over what retention has kept by layer and head, and what its
    `stats` are, if it has any.
    """
    told = cache.stats() if hasattr(cache, "stats") else {}
    kept = [n for layer in told.get("retention", {}).get("kept", []) for n in layer or []]
    if not kept:
        kept = [cache.held() if hasattr(cache, "held") else int(cache.get_seq_length())]
    return {"bytes_held": checked_bytes(cache), "tokens_held": fmean(kept)} | told


def _storage(x: torch.Tensor) -> tuple[int, int]:
    """Return address and bytes of a tensor's storage; (0, 0) for one with no memory of its own."""
    with torch._C.DisableTorchFunctionSubclass():  # a lazy view would answer by making itself dense
        try:
            storage = x.untyped_storage()
            address = storage.data_ptr()
        except (RuntimeError, NotImplementedError):  # wrapper subclasses have no storage
            return 0, 0
    return (address, storage.nbytes()) if address else (0, 0)


def no_room(need: float, device: torch.device) -> str | None:
    """Return why so many bytes do not fit in memory, or None."""
    room = free_bytes(device)
    if need <= SPARE * room:
        return None
    return f"does not fit: needs {need / 1e9:.2f} GB, {room / 1e9:.2f} GB are free"


def free_bytes(device: torch.device) -> int:
    """Return the memory that a cache can still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
