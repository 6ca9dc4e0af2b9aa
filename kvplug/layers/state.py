"""The state of layers as plain tensors and numbers: what copies, files and other processes need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

# tensors, and what JSON has for the rest
State = dict[str, "Tensor | int | float | bool | str | None"]


def nest(prefix: str, state: State) -> State:
    """`state` under names that begin with `prefix.`."""
    return {f"{prefix}.{name}": x for name, x in state.items()}


def part(state: State, prefix: str) -> State:
    """What `nest` has put under `prefix`."""
    start = f"{prefix}."
    return {name.removeprefix(start): x for name, x in state.items() if name.startswith(start)}


def rows(state: State, prefix: str) -> dict[str, Tensor]:
    """The tensors under `prefix`, by name: files have them in any order."""
    found = sorted(part(state, prefix).items())
    return {name: x for name, x in found if isinstance(x, torch.Tensor)}


NOW = "now."  # of a chunk: begins the name of what is whole at its end


def join(chunks: list[dict[str, Tensor]], axis: int) -> dict[str, Tensor]:
    """Chunks, one after the other, as one: tensors end to end, of what is whole the last."""
    names = dict.fromkeys(name for chunk in chunks for name in chunk)
    found = {name: [chunk[name] for chunk in chunks if name in chunk] for name in names}
    return {
        name: x[-1] if len(x) == 1 or NOW in name else torch.cat(x, dim=axis)
        for name, x in found.items()
    }


def attributes(layer: Any, names: Iterable[str] | None = None) -> State:
    """Tensors and numbers among the attributes of a layer of transformers; dicts by `name.key`.

    Names: those that count; None: all. Devices are left out, dtypes become their names.
    """
    state: State = {}
    for name in sorted(vars(layer)) if names is None else names:
        value = getattr(layer, name)
        items = value.items() if isinstance(value, dict) else [(None, value)]
        for key, x in items:
            where = name if key is None else f"{name}.{key}"
            if isinstance(x, torch.dtype):
                state[where] = str(x).removeprefix("torch.")
            elif x is None or isinstance(x, (torch.Tensor, int, float)):
                state[where] = x
    return state


def set_attributes(layer: Any, state: State) -> None:
    """The inverse of `attributes`, for a layer made alike; tensors are copied."""
    device = next((x.device for x in state.values() if isinstance(x, torch.Tensor)), None)
    for where, x in state.items():
        name, _, key = where.partition(".")
        if isinstance(x, torch.Tensor):
            x = x.clone()
        elif isinstance(x, str):
            x = getattr(torch, x)
        if key:
            getattr(layer, name)[int(key)] = x
        else:
            setattr(layer, name, x)
    for name in [name for name in vars(layer) if name.endswith("device") and device is not None]:
        setattr(layer, name, device)
