"""Which weights a model has: a digest of all of them, and what says that it still holds."""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from ..errors import StoreError, unknown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from torch.nn import Module

VERIFY = ("sampled", "full")
SAMPLES = 16  # elements of each tensor that are looked at in every call
# of a layer of peft: which adapters compute, by how much, and which are part of the weights by now
ADAPTER_STATE = ("active_adapters", "merged_adapters", "disable_adapters", "scaling")

_known: weakref.WeakKeyDictionary[Module, dict[str, tuple[Any, bytes]]]
_known = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def digest(model: Module, verify: str = "sampled") -> bytes:
    """A digest of the names, types, shapes and bytes of all parameters and buffers, 32 bytes.

    sha256, one tensor per thread: once for each model object, then only for tensors that have
    changed. `verify` says how that is found out: "sampled" by their address, torch's count of
    writes in place, and 16 elements of each, which notices all but an edit of few elements
    through `.data`; "full" by all bytes, every time.

    Raises StoreError for weights without data here, on the device `meta` or offloaded.
    """
    if verify not in VERIFY:
        raise StoreError(unknown("way to verify weights:", verify, list(VERIFY)))
    tensors = dict(_tensors(model))
    absent = next((name for name, x in tensors.items() if x.device.type == "meta"), None)
    if absent is not None:
        raise StoreError(
            f"the weights of {type(model).__name__} cannot be read ({absent!r} is offloaded or has "
            "no data): name them, cache_config={'store': ..., 'model_id': 'any name of your own'}"
        )
    looks = _looks(tensors)
    with _lock:
        known = _known.setdefault(model, {})
        if verify == "full":
            known.clear()
        stale = [name for name, look in looks.items() if known.get(name, (None,))[0] != look]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            digests = pool.map(_sha256, (tensors[name] for name in stale))
            known.update({name: (looks[name], d) for name, d in zip(stale, digests, strict=True)})
        whole = hashlib.sha256()
        for name, x in sorted(tensors.items()):
            whole.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode() + known[name][1])
        return whole.digest()


def adapters(model: Module) -> list:
    """What of adapters changes what the model computes without changing a tensor."""
    found = []
    for name, module in model.named_modules():
        if hasattr(module, "merged_adapters"):
            state = {x: _plain(getattr(module, x, None)) for x in ADAPTER_STATE}
            found.append([name, state])
    return found


def _tensors(model: Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by name; those that are made of others, as these."""
    for owned in (model.named_parameters(), model.named_buffers()):
        for name, x in owned:
            yield from _parts(name, x.detach())


def _parts(name: str, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    if type(x) is torch.Tensor or not hasattr(x, "__tensor_flatten__"):
        yield name, x
        return
    for part in x.__tensor_flatten__()[0]:  # a subclass, as quantized weights are
        yield from _parts(f"{name}.{part}", getattr(x, part))


def _looks(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    """What is looked at in every call: where each tensor is, how often written, some elements."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    groups: dict[tuple, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        if x.is_complex():
            x = torch.view_as_real(x)
        flat = x.reshape(-1)  # a copy where there are gaps
        some = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].view(integers[x.itemsize])
        groups.setdefault((x.device, x.itemsize), {})[name] = some
    found: dict[str, bytes] = {}
    for group in groups.values():  # one copy from a device, not one per tensor
        together = torch.cat(list(group.values())).cpu().numpy().tobytes()
        end = 0
        for name, some in group.items():
            start, end = end, end + some.nbytes
            found[name] = together[start:end]
    return {
        name: (x.data_ptr(), -1 if x.is_inference() else x._version, x.dtype, x.shape, found[name])
        for name, x in tensors.items()
    }


def _sha256(x: Tensor) -> bytes:
    data = x.cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(memoryview(data.numpy())).digest()


def _plain(x: Any) -> Any:
    """An attribute as JSON has it; names and numbers by string, in order."""
    if isinstance(x, dict):
        return sorted([str(k), str(v)] for k, v in x.items())
    return [str(i) for i in x] if isinstance(x, (list, tuple)) else str(x)
