"""The contract of a codec, and golden bytes."""

from __future__ import annotations

import base64
import copy
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ..codecs.formats import FORMATS, WIDTHS
from ..spec import parse

if TYPE_CHECKING:
    from torch import Tensor

    from ..codecs.base import Codec, Encoded
from .pairs import pairwise
from .tools import DRAWN, DTYPES, normal, raw_bytes, same


def golden_blocks(codec: Codec) -> tuple[Tensor, Tensor]:
    """Keys and values [1, 2, 2, block, 16] made by arithmetic alone: the same on every machine."""
    n = 2 * 2 * codec.block * 16
    i = torch.arange(n, dtype=torch.float64)
    keys = ((i * 37 % 101) - 50) / 16 + 4 * ((i % 16) == 3)  # one channel with a bias
    values = ((i * 53 % 89) - 44) / 32
    shape = (1, 2, 2, codec.block, 16)
    return keys.float().view(shape), values.float().view(shape)


def check_golden(codec: Codec, folder: Path | str, regen: bool = False) -> None:
    """The bytes a codec makes of a fixed input equal those on record, and the record still decodes.

    Args:
        codec: as users get it; its name and repr are part of the record.
        folder: holds `<name>.json`. An absent record is a failure.
        regen: write the record instead; for a change of format that is meant.
    """
    path = Path(folder) / f"{codec.name}.json"
    keys, values = golden_blocks(codec)
    data = codec.encode(keys, values)
    if regen:
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"codec": repr(codec), "tensors": {k: to_json(x) for k, x in data.items()}}
        path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    assert path.exists(), f"no golden bytes at {path}: run pytest --regen once and commit the file"
    record = json.loads(path.read_text())
    assert record["codec"] == repr(codec), f"{path} is of {record['codec']}, not {codec!r}"
    stored = {name: from_json(x) for name, x in record["tensors"].items()}
    assert sorted(stored) == sorted(data)
    for name, x in data.items():
        assert same(x, stored[name]), f"{codec!r}: bytes of {name!r} differ from {path}"
    _assert_within_bound(codec, keys, values, stored)


def to_json(x: Tensor) -> dict:
    """A tensor's dtype, shape and bytes."""
    raw = bytes(raw_bytes(x).tolist())
    return {
        "dtype": str(x.dtype).removeprefix("torch."),
        "shape": list(x.shape),
        "base64": base64.b64encode(raw).decode(),
    }


def from_json(x: dict) -> Tensor:
    """The inverse of `to_json`."""
    raw = torch.tensor(list(base64.b64decode(x["base64"])), dtype=torch.uint8)
    return raw.view(getattr(torch, x["dtype"])).view(x["shape"])


def random_blocks(
    codec: Codec,
    *,
    B: int = 2,
    H: int = 3,
    N: int = 2,
    Dk: int = 64,
    Dv: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Keys [B, H, N, block, Dk] with an outlier channel each, values [B, H, N, block, Dv]."""
    keys = normal(B, H, N, codec.block, Dk, seed=seed)
    keys[..., seed % Dk] *= 12
    values = normal(B, H, N, codec.block, Dv, seed=seed + 1)
    return keys.to(dtype), values.to(dtype)


def bounds(codec: Codec, data: Encoded) -> tuple[Tensor, Tensor]:
    """The codec's own bounds for keys and for values."""
    return codec.max_error(data, 0), codec.max_error(data, 1)


def _assert_within_bound(codec: Codec, keys: Tensor, values: Tensor, data: Encoded) -> None:
    """Everything is within the codec's own bound, and the bound itself is a number."""
    for side, x, y, bound in zip(
        ("keys", "values"), (keys, values), codec.decode(data), bounds(codec, data), strict=True
    ):
        assert y.shape == x.shape, f"{side}: decoded {tuple(y.shape)} from {tuple(x.shape)}"
        bound = bound.double().expand(x.shape)
        assert bound.isfinite().all(), f"{side}: the bound is not finite"
        error = (y.double() - x.double()).abs()
        over = error - bound * (1 + 1e-6)
        assert error.isfinite().all(), f"{side}: decoded something that is not finite"
        assert not (over > 0).any(), (
            f"{side}: error {float(error.max()):.6g}, {float(over.max()):.3g} above the bound"
        )


HEADS = [(16, 16), (33, 33), (64, 48), (80, 80), (96, 128), (112, 112), (192, 128)]
SIZES = [
    (row["dtype"], row["N"], *row["heads"])
    for row in pairwise({"heads": HEADS, "dtype": DTYPES, "N": [0, 1, 3]})
]


class CodecConformance:
    """The contract of `kvplug.Codec`. Override the fixture `codec`; small blocks test faster.

    Set `key_bias = False` in the subclass of a codec that is known not to stand a large constant
    in one key channel, as Qwen2 has: it will be inaccurate with such models.
    """

    key_bias: ClassVar[bool] = True

    @pytest.fixture
    def codec(self) -> Codec:
        """The codec under test."""
        raise NotImplementedError("override the fixture 'codec'")

    def test_repr_and_str_parse_back(self, codec: Codec) -> None:
        """A result can be rebuilt from its record."""
        assert parse(repr(codec)).codec == codec
        assert parse(str(codec)).codec == codec
        assert hash(copy.deepcopy(codec)) == hash(codec)

    @pytest.mark.parametrize(("dtype", "N", "Dk", "Dv"), SIZES)
    def test_error_within_own_bound(
        self, codec: Codec, dtype: torch.dtype, N: int, Dk: int, Dv: int
    ) -> None:
        """Any float type, any number of blocks, awkward head dims, a silent head."""
        keys, values = random_blocks(codec, N=N, Dk=Dk, Dv=Dv, dtype=dtype, seed=N)
        keys[:, 0] = values[:, 0] = 0
        data = codec.encode(keys, values)
        for x in codec.decode(data):
            assert x.dtype in ((dtype,) if codec.lossless else (dtype, torch.float32))
        _assert_within_bound(codec, keys, values, data)

    def test_bound_says_something(self, codec: Codec) -> None:
        """A bound as wide as the data would make every other check empty."""
        keys, values = random_blocks(codec, N=8)
        data = codec.encode(keys, values)
        for x, bound in zip((keys, values), bounds(codec, data), strict=True):
            widths = x.amax((2, 3, 4)) - x.amin((2, 3, 4))
            assert (bound.expand(x.shape).mean((2, 3, 4)) <= widths).all()
            if codec.lossless:
                assert not bound.any()

    @given(
        scale=st.floats(-6, 4),
        offset=st.sampled_from([0.0, 1.0, -3.5, 600.3, -600.3, 20000.0]),
        dtype=st.sampled_from(DTYPES),
        D=st.integers(1, 12).map(lambda n: 8 * n),
        seed=st.integers(0, 2**16),
    )
    @DRAWN
    def test_error_within_own_bound_at_any_scale(
        self, codec: Codec, scale: float, offset: float, dtype: torch.dtype, D: int, seed: int
    ) -> None:
        """From 1e-6 to 1e4, around zero and far from it."""
        keys, values = (
            (x * 10**scale + offset).clamp(-6e4, 6e4).to(dtype)
            for x in random_blocks(codec, B=1, H=2, N=1, Dk=D, Dv=D, seed=seed)
        )
        _assert_within_bound(codec, keys, values, codec.encode(keys, values))

    @pytest.mark.parametrize("constant", [0.0, 1.0, -2.7, 600.3, 1e-7])
    def test_constant_blocks(self, codec: Codec, constant: float) -> None:
        """No division by a range of zero."""
        keys, values = (torch.full_like(x, constant) for x in random_blocks(codec))
        data = codec.encode(keys, values)
        _assert_within_bound(codec, keys, values, data)
        assert (codec.decode(data)[0] - constant).abs().max() <= 2e-3 * abs(constant) + 1e-6

    def test_later_tokens_may_be_larger(self, codec: Codec) -> None:
        """No scale is frozen by the first tokens: larger blocks are as exact, relatively."""
        keys, values = random_blocks(codec, N=3)
        factor = torch.tensor([1.0, 100.0, 0.01])[:, None, None]
        data = codec.encode(keys * factor, values * factor)
        _assert_within_bound(codec, keys * factor, values * factor, data)
        for x, bound in zip((keys, values), bounds(codec, data), strict=True):
            bound = bound.expand(x.shape).amax((0, 1, 3, 4))
            assert bound[1] <= 200 * bound[0] + 1e-6
            assert bound[2] <= bound[0] + 1e-6

    def test_large_key_bias(self, codec: Codec) -> None:
        """600 in one key channel (Qwen2) moves all scores alike: attention is as good."""
        if not self.key_bias:
            pytest.skip(f"{codec.name}: says key_bias = False")
        keys, values = random_blocks(codec, B=1, H=2, N=4, seed=3)
        query = normal(1, 2, 5, 64, seed=5)
        errors = []
        for bias in (0.0, 600.0):
            biased = keys.clone()
            biased[..., 7] += bias
            k, v = (x.flatten(2, 3).float() for x in codec.decode(codec.encode(biased, values)))
            exact = sdpa(
                query.double(), biased.flatten(2, 3).double(), values.flatten(2, 3).double()
            )
            errors.append(
                float((sdpa(query.double(), k.double(), v.double()) - exact).abs().mean())
            )
        assert errors[1] <= 2 * errors[0] + 1e-3

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_stays_where_it_is_and_shows(
        self, codec: Codec, poison: float, dtype: torch.dtype
    ) -> None:
        """NaN and infinity become no plausible numbers and reach no other block, head, row."""
        keys, values = random_blocks(codec, N=3, dtype=dtype)
        clean = codec.encode(keys.clone(), values.clone())
        where = (1, 2, 1, 3, 5)
        keys[where] = values[where] = poison
        data = codec.encode(keys, values)
        for x in codec.decode(data):
            assert not x[where].isfinite()
        for name, x in data.items():
            others = torch.ones(x.shape[:3], dtype=torch.bool)
            others[where[:3]] = False
            assert same(x[others], clean[name][others]), f"{name!r} differs in other blocks"

    @pytest.mark.parametrize("size", [1e5, 1e6, 3e38])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_what_is_too_large_shows(self, codec: Codec, size: float, sign: int) -> None:
        """Beyond the range of the scales: within the bound, or not finite; never clipped."""
        keys, values = random_blocks(codec, N=1)
        where = (0, 1, 0, 2, 3)
        keys[where] = values[where] = sign * size
        data = codec.encode(keys, values)
        for x, y, bound in zip(
            (keys, values), codec.decode(data), bounds(codec, data), strict=True
        ):
            error, bound = (y - x).abs(), bound.expand(x.shape)
            assert ((error <= bound * (1 + 1e-6)) | ~y.isfinite()).all()

    def test_blocks_encode_as_they_would_alone(self, codec: Codec) -> None:
        """Append equals at once, byte for byte; so do rows, heads, and input of any stride."""
        keys, values = random_blocks(codec, N=3)
        data = codec.encode(keys, values)
        for axis in (0, 1, 2):
            parts = [
                codec.encode(k, v)
                for k, v in zip(keys.split(1, axis), values.split(1, axis), strict=True)
            ]
            for name, x in data.items():
                assert same(torch.cat([p[name] for p in parts], axis), x)
        strided = codec.encode(
            *(x.transpose(1, 3).contiguous().transpose(1, 3) for x in (keys, values))
        )
        again = codec.encode(keys, values)
        for name, x in data.items():
            assert same(strided[name], x)
            assert same(again[name], x)

    def test_a_side_knows_nothing_of_the_other(self, codec: Codec) -> None:
        """Keys encode as they would beside any values, and names do not meet."""
        blocks, others = random_blocks(codec, Dk=32, Dv=48), random_blocks(codec, Dk=32, seed=7)
        together = codec.encode(*blocks)
        alone: set[str] = set()
        for side in (0, 1):
            codec.encode_side(others[1 - side] * 100, 1 - side)  # nor does one before leave a trace
            data = codec.encode_side(blocks[side], side)
            assert not alone & set(data), f"names of both sides: {sorted(alone & set(data))}"
            alone |= set(data)
            for name, x in data.items():
                assert same(x, together[name]), f"{name!r} depends on the other side"
            decoded = codec.decode_side(data, side).contiguous()
            assert same(decoded, codec.decode(together)[side].contiguous())
        assert alone == set(together)

    def test_axes(self, codec: Codec) -> None:
        """Every tensor is [B, H, N, ...], so that blocks can be sliced; a slice decodes alone."""
        keys, values = random_blocks(codec, B=2, H=3, N=4, Dk=48, Dv=32)
        data = codec.encode(keys, values)
        for name, x in data.items():
            assert x.shape[:3] == (2, 3, 4), f"{name!r} is {tuple(x.shape)}"
        whole = codec.decode(data)
        part = codec.decode({name: x[:, :, 1:3] for name, x in data.items()})
        for x, y in zip(whole, part, strict=True):
            assert same(x[:, :, 1:3].contiguous(), y.contiguous())

    def test_format(self, codec: Codec) -> None:
        """The tensors are those of the format the codec names, and mean there what it decodes."""
        if codec.format is None:
            pytest.skip(f"{codec.name}: a format of its own, which no compiled kernel reads")
        assert codec.format in FORMATS, f"{codec.format!r} is none of {', '.join(FORMATS)}"
        named = FORMATS[codec.format]
        if codec.format in ("affine", "rotated"):  # kernels would read other codes wrongly
            assert {codec.k_bits, codec.v_bits} <= set(WIDTHS)
        for dtype in DTYPES:
            keys, values = random_blocks(codec, Dk=48, Dv=32, dtype=dtype)
            data = codec.encode(keys, values)
            found = {name: (x.dtype, x.shape[3:]) for name, x in data.items()}
            assert found == named.tensors(codec, keys, values, data)
            for side, x in enumerate(codec.decode(data)):
                assert same(named.decode(codec, data, side).contiguous(), x.contiguous())

    def test_input_is_neither_changed_nor_kept(self, codec: Codec) -> None:
        """`encode` is pure: the model's tensors are its own to reuse."""
        keys, values = random_blocks(codec)
        before = keys.clone(), values.clone()
        data = codec.encode(keys, values)
        assert same(keys, before[0])
        assert same(values, before[1])
        kept = {name: x.clone() for name, x in data.items()}
        codec.decode(data)
        assert all(same(data[name], x) for name, x in kept.items()), "decode changed its input"
        if codec.decodes_in_place:
            pytest.skip(
                f"{codec.name}: decodes in place, so what it encodes may be the input itself"
            )
        keys.zero_()
        values.zero_()
        assert all(same(data[name], x) for name, x in kept.items()), "encode kept its input"

    def test_decodes_in_place_tells_the_truth(self, codec: Codec) -> None:
        """Kernels read many blocks at once where decoding costs nothing."""
        data = codec.encode(*random_blocks(codec))
        own = {x.untyped_storage()._cdata for x in data.values()}
        shared = [x.untyped_storage()._cdata in own for x in codec.decode(data)]
        assert all(shared) if codec.decodes_in_place else not any(shared)

    def test_traces_into_one_graph(self, codec: Codec) -> None:
        """`static` compiles encode and decode with the model."""
        keys, values = random_blocks(codec, B=1, H=2, N=1, Dk=32, Dv=32)
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda k, v: codec.decode(codec.encode(k, v)), backend="eager", fullgraph=True
        )
        for x, y in zip(
            compiled(keys, values), codec.decode(codec.encode(keys, values)), strict=True
        ):
            assert same(x.contiguous(), y.contiguous())

    def test_shapes_without_data(self, codec: Codec) -> None:
        """`kvplug.estimate` encodes tensors of the device `meta`, where nothing is rounded."""
        keys, values = random_blocks(codec, N=3)
        moment = keys.float().flatten(2, 3).mT @ keys.float().flatten(2, 3)
        meta = codec.encode(keys.to("meta"), values.to("meta"))
        for seen in (None, moment) if codec.feedback else (None,):
            real = codec.encode(keys, values, seen)
            assert {k: (x.shape, x.dtype) for k, x in real.items()} == {
                k: (x.shape, x.dtype) for k, x in meta.items()
            }
