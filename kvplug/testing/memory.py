"""Bytes held and bytes allocated, measured independently of the code under test."""

from __future__ import annotations

import gc
import types
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..attention.view import View

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def walked_bytes(root: object) -> int:
    """Bytes of all tensors that the garbage collector reaches from an object, storage once.

    Written apart from `Cache.nbytes`, which it judges: no list of containers, no attribute names.
    """
    found, met, todo = {}, set(), [root]
    stop = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, weakref.ref)
    while todo:
        x = todo.pop()
        if id(x) in met or isinstance(x, stop):
            continue
        met.add(id(x))
        if isinstance(x, torch.Tensor):
            found[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        todo.extend(gc.get_referents(x))
    return sum(found.values())


class _Allocations(TorchDispatchMode):
    """Bytes that are alive at once among the storages that operators make while the mode is on."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.alive = {x.untyped_storage()._cdata for x in known}  # not ours: there before
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor) and not isinstance(x, View):
                self._meet(x, ours=False)
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and not isinstance(x, View):
                self._meet(x, ours=True)
        return out

    def _meet(self, x: Tensor, ours: bool) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return
        self.alive.add(key)
        if ours:
            self.now += size
            self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size if ours else 0)

    def _gone(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes of new tensors alive at once while `run` runs, its result included."""
    mode = _Allocations([])
    with mode:
        out = run()
    del out
    return mode.peak


def storages_of(root: object) -> set[int]:
    """Addresses of the storages that the garbage collector reaches from an object."""
    found, met, todo = set(), set(), [root]
    while todo:
        x = todo.pop()
        if id(x) in met or isinstance(x, (type, types.ModuleType, types.FunctionType)):
            continue
        met.add(id(x))
        if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes():
            found.add(x.untyped_storage().data_ptr())
        todo.extend(gc.get_referents(x))
    return found
