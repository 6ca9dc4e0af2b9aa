"""Names of chunks: what was computed, by which model, from which tokens on.

A key is 32 bytes: 8 of the salt, 24 of a sha256 that is chained over the chunks of a row, from a
root that names all that keys and values depend on beside the tokens. Where caches lie and which
kernel reads them is not among it, nor threads, hardware and versions of torch, which change last
bits alone. The same in every process and on every machine.
"""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from typing import TYPE_CHECKING, Any

import torch

from ..compat import ATTENTION
from ..errors import StoreError
from . import weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..strategy import Strategy

FORMAT = 3  # of keys and of what is stored under them; another where either changes
TAG = 8  # bytes of a key that say the salt
# fields of a config that change no key or value
NAMES = {
    "_name_or_path",
    "_commit_hash",
    "transformers_version",
    "use_cache",
    "dtype",
    "torch_dtype",
}


def tag(salt: str) -> bytes:
    """What all keys of a salt begin with. Raises StoreError for what is no text."""
    if not isinstance(salt, str):
        raise StoreError(f"salt={salt!r}: a text")
    return hashlib.sha256(salt.encode()).digest()[:TAG]


def root(
    model: torch.nn.Module,
    strategy: Strategy,
    chunk: int,
    salt: str,
    verify: str = "sampled",
    model_id: str | None = None,
) -> bytes:
    """What the chain of every row begins with, 32 bytes.

    Args:
        model: of transformers. Its config without names, its weights, dtypes, adapters and kind of
            attention count.
        strategy: retention and each layer's codec count.
        chunk: tokens of a chunk.
        salt: of the tenant.
        verify: how the weights are compared with those digested before, see `weights.digest`.
        model_id: a name in place of a digest of the weights, where they cannot be read. Whoever
            gives it answers for it: other weights under the same name are not noticed.

    Raises StoreError for weights that cannot be read, and for another word of `verify`.
    """
    config = model.config.get_text_config(decoder=True)
    device = next((p.device.type for p in model.parameters()), "cpu")
    autocast = None
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        autocast = str(torch.get_autocast_dtype(device))
    says = {
        "format": FORMAT,
        "model": type(model).__name__,
        "config": _without_names(model.config.to_dict()),
        "weights": model_id or weights.digest(model, verify).hex(),
        "named": model_id is not None,
        "autocast": autocast,
        "attention": getattr(config, ATTENTION, None),
        "adapters": weights.adapters(model),
        "retention": repr(strategy.retention),
        "codecs": _codecs(strategy, config.num_hidden_layers),
        "chunk": chunk,
        "salt": salt,
    }
    text = json.dumps(says, sort_keys=True, default=str)
    return tag(salt) + hashlib.sha256(text.encode()).digest()[TAG:]


def chain(root: bytes, ids: Sequence[int] | Tensor, chunk: int) -> list[bytes]:
    """One key for each whole chunk of `ids`, the tokens of one row from its first one on."""
    numbers = array("q", ids.tolist() if hasattr(ids, "tolist") else ids)
    if sys.byteorder == "big":
        numbers.byteswap()
    data, width = memoryview(numbers.tobytes()), chunk * numbers.itemsize
    keys, last = [], root
    for end in range(width, len(data) + 1, width):
        link = hashlib.sha256(last)
        link.update(data[end - width : end])
        last = root[:TAG] + link.digest()[TAG:]
        keys.append(last)
    return keys


def _codecs(strategy: Strategy, layers: int) -> list[str]:
    named = strategy.named(layers)
    return [repr(named.get(i, strategy.codec)) for i in range(layers)]


def _without_names(config: Any) -> Any:
    """A config as a dict without the fields that change nothing, those inside of it neither."""
    if isinstance(config, dict):
        return {str(k): _without_names(v) for k, v in config.items() if k not in NAMES}
    if isinstance(config, (list, tuple)):
        return [_without_names(x) for x in config]
    if isinstance(config, (set, frozenset)):
        return sorted(map(str, config))  # whose order changes with every process
    return config
