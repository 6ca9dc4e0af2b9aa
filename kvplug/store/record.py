"""A record: one chunk of a cache as bytes that prove, when read, that they are what was asked for.

```
offset  bytes
     0      8  magic, with the version of this format
     8     32  sha256 over all that follows
    40     32  key: a file under another record's name is not taken for it
    72      8  0: the body is as it is; n: packed by blosc2, as elements of n bytes
    80      8  bytes of the body before it was packed
    88      8  zero: what follows is aligned to 32 bytes
    96         body: safetensors
```

Numbers are little-endian. Nothing in a record is run or unpickled, and no number in it is believed
before the checksum holds. A checksum is no signature: who may write to a store may forge records.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load, save

from ..registry import load as load_module

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

MAGIC = b"kvplug\x00\x01"
HEAD = struct.Struct("<8s32s32sQQ8x")
SIGNED = 8 + 32  # the checksum covers what follows
LARGEST = 1 << 32  # bytes of a record: more is no chunk of a cache


class Bad(Exception):
    """A record that is not what was asked for: `reason`, in a word."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def pack(key: bytes, tensors: dict[str, Tensor], compress: bool = False) -> bytes:
    """The record of `tensors` under `key` (32 bytes). Tensors may lie on any device.

    compress: pack the body where all tensors are floating point numbers of one type: bytes of
        equal weight side by side, then zstd at level 1. Codes of a codec would shrink by 5 %.
    """
    body = save({name: _alone(x) for name, x in sorted(tensors.items())})
    size, width = len(body), _width(tensors) if compress else 0
    if width:
        blosc2 = blosc2_module()
        body = blosc2.compress2(
            body,
            typesize=width,
            codec=blosc2.Codec.ZSTD,
            clevel=1,
            filters=[blosc2.Filter.SHUFFLE],
            nthreads=1,
        )
    rest = HEAD.pack(b"", b"", key, width, size)[SIGNED:]
    checksum = hashlib.sha256(rest)
    checksum.update(body)
    return b"".join((MAGIC, checksum.digest(), rest, body))


def unpack(key: bytes, record: bytes) -> dict[str, Tensor]:
    """The tensors that `pack` was given, on the CPU, by name.

    Raises Bad: another format, key or size than expected, or a bit that has changed; MissingExtra
    for a packed record where blosc2 lacks.
    """
    if len(record) < HEAD.size:
        raise Bad("truncated")
    magic, checksum, inside, width, size = HEAD.unpack_from(record)
    if magic != MAGIC:
        raise Bad("version")
    if inside != key:
        raise Bad("key")
    if not hmac.compare_digest(checksum, hashlib.sha256(memoryview(record)[SIGNED:]).digest()):
        raise Bad("checksum")
    body = record[HEAD.size :]
    if width:
        body = _unpacked(body, size)
    if len(body) != size:
        raise Bad("size")
    try:
        return dict(sorted(load(body).items()))  # safetensors returns names in any order
    except (SafetensorError, KeyError, ValueError, RuntimeError) as e:
        raise Bad("body") from e  # only a forger's: the checksum holds


def blosc2_module() -> ModuleType:
    """The package blosc2. Raises MissingExtra."""
    return load_module("blosc2", "a store with compress=True, or what it has written,")


def _unpacked(body: bytes, size: int) -> bytes:
    """Raises Bad where it is no body of `size` bytes, before memory is taken."""
    blosc2 = blosc2_module()
    try:
        if size > LARGEST or blosc2.get_cbuffer_sizes(body)[0] != size:
            raise Bad("size")
        return blosc2.decompress2(body, nthreads=1)
    except (RuntimeError, ValueError) as e:
        raise Bad("body") from e


def _width(tensors: dict[str, Tensor]) -> int:
    """Bytes of the one floating type of all tensors; 0 where there are others."""
    dtypes = {x.dtype for x in tensors.values()}
    only = dtypes.pop() if len(dtypes) == 1 else None
    return only.itemsize if only is not None and only.is_floating_point else 0


def _alone(x: Tensor) -> Tensor:
    """`x` on the CPU in memory of its own: safetensors refuses what is shared or has gaps."""
    x = x.detach().cpu().contiguous()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()
