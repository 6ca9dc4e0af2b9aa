"""Records: what comes back is what went in, or nothing."""

import hashlib
import random
import struct
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvplug
from kvplug import registry
from kvplug.store import record
from kvplug.store.record import HEAD, SIGNED, Bad, pack, unpack
from kvplug.testing.tools import normal, same

KEY, OTHER = b"k" * 32, b"o" * 32
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8, torch.int64]


@given(
    st.dictionaries(
        st.text(max_size=9).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4)),
        max_size=4,
    )
)
def test_round_trip(shapes):
    tensors = {
        name: normal(1, *shape, seed=i)[0].mul(40).to(dtype)
        for i, (name, (dtype, shape)) in enumerate(shapes.items())
    }
    found = unpack(KEY, pack(KEY, tensors))
    assert list(found) == sorted(tensors)
    assert all(same(found[name], x) for name, x in tensors.items())


def test_views_and_shared_memory_are_stored_alone():
    x = normal(4, 6, 8, seed=0)
    found = unpack(KEY, pack(KEY, {"a": x[1:3], "b": x[1:3], "c": x.transpose(0, 2)}))
    assert same(found["a"], x[1:3].contiguous())
    assert same(found["c"], x.transpose(0, 2).contiguous())
    assert len(pack(KEY, {"a": x[:1]})) < x.nbytes


def test_a_thousand_bad_records():
    """Bits, truncation, growth, other keys, pieces of another record: never loaded."""
    good = pack(KEY, {"k": normal(2, 16, 8, seed=0), "v": normal(2, 16, 8, seed=1)})
    other = pack(OTHER, {"k": normal(2, 16, 8, seed=2), "v": normal(2, 16, 8, seed=3)})
    draw, reasons = random.Random(0), []
    for i in range(1000):
        bad, at = bytearray(good), draw.randrange(len(good))
        match i % 5:
            case 0:
                bad[at] ^= 1 << draw.randrange(8)
            case 1:
                del bad[at:]
            case 2:
                bad += draw.randbytes(1 + at % 99)
            case 3:
                bad = bytearray(other)
            case 4:
                bad[at : at + 64] = other[at : at + 64] or b"?"
        if bytes(bad) == good:  # where both records are alike
            bad[at] ^= 255
        with pytest.raises(Bad) as e:
            unpack(KEY, bytes(bad))
        reasons.append(e.value.reason)
    assert set(reasons) == {"truncated", "version", "key", "checksum"}
    assert unpack(KEY, good)


def test_packed_where_it_pays():
    pytest.importorskip("blosc2")
    smooth = {"k": torch.arange(20000.0), "v": torch.zeros(40, 500)}
    codes = {"k": torch.zeros(9999, dtype=torch.uint8), "scale": torch.zeros(99)}
    assert pack(KEY, codes, compress=True) == pack(KEY, codes)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = {name: x.to(dtype) for name, x in smooth.items()}
        packed = pack(KEY, tensors, compress=True)
        assert len(packed) < 0.5 * len(pack(KEY, tensors))
        found = unpack(KEY, packed)
        assert all(same(found[name], x) for name, x in tensors.items())
        for cut in (len(packed) // 2, len(packed) - 1):
            with pytest.raises(Bad):
                unpack(KEY, packed[:cut])
            size = len(pack(KEY, tensors)) - HEAD.size  # as a forger would
            for claimed in (size, size + 1, 1 << 60):
                with pytest.raises(Bad):
                    unpack(KEY, forged(packed[HEAD.size : cut], size=claimed, packed=4))


def test_a_packed_record_wants_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "blosc2", None)
    monkeypatch.setattr(registry, "EXTRAS", registry.EXTRAS | {None: "store"})
    text = r"compress=True, or what it has written, needs .*pip install 'kvplug\[store\]'"
    with pytest.raises(kvplug.MissingExtra, match=text):
        kvplug.Store("memory://", compress=True)
    mine = kvplug.Store("memory://")
    mine._backend.put_many([(KEY, forged(b"x", packed=4))])
    assert list(mine.load([KEY])) == []
    assert mine.stats()["misses"] == {"MissingExtra": 1}
    assert len(list(mine.entries())) == 1  # it may be good, for others


def forged(body, size=None, packed=0):
    rest = HEAD.pack(b"", b"", KEY, packed, len(body) if size is None else size)[SIGNED:]
    return record.MAGIC + hashlib.sha256(rest + body).digest() + rest + body


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (forged(b"", size=1 << 60), "size"),
        (forged(b"x" * 100, size=99), "size"),
        (forged(b""), "body"),
        (forged(struct.pack("<Q", 1 << 60) + b"{}"), "body"),
        (forged(struct.pack("<Q", 2) + b"[]"), "body"),
        (forged(struct.pack("<Q", 70) + b'{"k":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}    '), "body"),  # noqa: E501
    ],
)  # fmt: skip
def test_a_forged_number_takes_no_memory(bad, reason):
    """The checksum is right: somebody made it so."""
    with pytest.raises(Bad) as e:
        unpack(KEY, bad)
    assert e.value.reason == reason


def test_bytes_are_on_record():
    """A change of what is written is a change of MAGIC."""
    found = pack(KEY, {"v": torch.arange(6.0).view(2, 3), "k": torch.arange(4, dtype=torch.int8)})
    digest = "c22bbd81060597aaa60525dc0e5c71a022041a206093a22ecd6f53a726c5805d"
    assert hashlib.sha256(found).hexdigest() == digest
