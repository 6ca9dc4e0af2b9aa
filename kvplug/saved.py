"""One cache in a folder: what `cache.save(folder)` writes and `kvplug.load(folder, model)` reads.

    cache.json                         strategy, model, numbers of each layer, files, their sha256
    tensors-XXXXXXXX/007.safetensors   tensors of layer 7, blocks as they are encoded

Tensors go to files of a new name before `cache.json` takes the place of the old one in one step, so
that a reader finds the old cache or the new one, whenever a writer ends. Layer by layer: no more
than one is in memory twice.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, save

from .errors import Mismatch

if TYPE_CHECKING:
    from .layers.state import State

INDEX = "cache.json"
TENSORS = "tensors-"
HEAD = ("format", "strategy", "model", "may_grow")


def write(folder: Path, head: dict[str, Any], layers: list[State]) -> None:
    """Put a cache of these states into `folder`, in the place of the one that is there.

    head: what is not of a single layer, in JSON's types, by the names of HEAD.
    """
    folder.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=TENSORS, dir=folder))
    try:
        index = head | {"layers": [_write(new, i, state) for i, state in enumerate(layers)]}
        written = new / INDEX
        written.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        written.replace(folder / INDEX)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    for old in folder.glob(f"{TENSORS}*"):  # of the cache before, or of a writer that was ended
        if old != new:
            shutil.rmtree(old, ignore_errors=True)


def _write(new: Path, i: int, state: State) -> dict[str, Any]:
    tensors = {name: x for name, x in state.items() if isinstance(x, torch.Tensor)}
    data = save({name: x.detach().contiguous() for name, x in tensors.items()})
    file = new / f"{i:03}.safetensors"
    file.write_bytes(data)
    return {
        "file": f"{new.name}/{file.name}",
        "sha256": hashlib.sha256(data).hexdigest(),
        "numbers": {name: x for name, x in state.items() if name not in tensors},
    }


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The head of the cache in `folder`, and what `tensors` finds each layer by.

    Raises FileNotFoundError without one, Mismatch where it is not as it was written.
    """
    path = folder / INDEX
    if not path.exists():
        raise FileNotFoundError(f"no cache in {folder}: cache.save({str(folder)!r}) writes one")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        return {name: index[name] for name in HEAD}, index["layers"]
    except (ValueError, KeyError, TypeError) as e:
        raise Mismatch(f"{path} is not what cache.save has written: {e!r}") from None


def state_of(folder: Path, layer: dict[str, Any], device: torch.device) -> State:
    """The state of one layer, its tensors on `device`.

    Raises Mismatch where its file is not the one that was written.
    """
    path = folder / layer["file"]
    data = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(data).hexdigest() != layer["sha256"]:
        raise Mismatch(f"{path} is not as it was written: save the cache again")
    return layer["numbers"] | {name: x.to(device) for name, x in load(data).items()}
