"""A record: one chunk of a cache as bytes that prove, when read, that they are what was asked for.

```
offset  bytes
     0      8  magic, with the version of this format
     8     32  sha256 over all that follows
    40     32  key: a file under another record's name is not taken for it
    72      8  0: the body is as it is
    80      8  bytes of the body
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

if TYPE_CHECKING:
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


def pack(key: bytes, tensors: dict[str, Tensor]) -> bytes:
    """The record of `tensors` under `key` (32 bytes). Tensors may lie on any device."""
    body = save({name: _alone(x) for name, x in sorted(tensors.items())})
    rest = HEAD.pack(b"", b"", key, 0, len(body))[SIGNED:]
    checksum = hashlib.sha256(rest)
    checksum.update(body)
    return b"".join((MAGIC, checksum.digest(), rest, body))


def unpack(key: bytes, record: bytes) -> dict[str, Tensor]:
    """The tensors that `pack` was given, on the CPU, by name.

    Raises Bad: another format, key or size than expected, or a bit that has changed.
    """
    if len(record) < HEAD.size:
        raise Bad("truncated")
    magic, checksum, inside, packed, size = HEAD.unpack_from(record)
    if magic != MAGIC:
        raise Bad("version")
    if inside != key:
        raise Bad("key")
    if not hmac.compare_digest(checksum, hashlib.sha256(memoryview(record)[SIGNED:]).digest()):
        raise Bad("checksum")
    body = record[HEAD.size :]
    if packed or len(body) != size:
        raise Bad("size")
    try:
        return dict(sorted(load(body).items()))  # safetensors returns names in any order
    except (SafetensorError, KeyError, ValueError, RuntimeError) as e:
        raise Bad("body") from e  # only a forger's: the checksum holds


def _alone(x: Tensor) -> Tensor:
    """`x` on the CPU in memory of its own: safetensors refuses what is shared or has gaps."""
    x = x.detach().cpu().contiguous()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()
