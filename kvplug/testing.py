"""Conformance suites for plugins: subclass one, override its fixture, and pytest runs the contract.

```python
from kvplug.testing import CodecConformance, StrategyConformance

class TestMyCodec(CodecConformance):
    @pytest.fixture
    def codec(self):
        return MyCodec(block=8)

class TestMyStrategy(StrategyConformance):
    @pytest.fixture
    def spec(self):
        return "sinks(sinks=2, window=10)+mycodec(block=8)"
```

A suite asks the stage itself what it promises (`codec.lossless`, `codec.max_error`,
`retention.newest`, ...) and skips, with the reason, what it does not promise. Models are tiny,
random and built from a config: nothing is downloaded. Use small blocks and windows, so that short
sequences reach every edge. Needs pytest and hypothesis, which only this module imports.
"""

from __future__ import annotations

import base64
import copy
import dataclasses
import gc
import json
import math
import threading
import types
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from .buffer import Buffer
from .cache import Cache, build
from .codecs.exact import Exact
from .errors import CacheOverflow, Evicted
from .kernels.reference import Reference
from .layer import Layer
from .layout.growing import Growing
from .placement.device import Device
from .retention.base import Retention, Scored
from .retention.full import Full
from .spec import PREFIX, Strategy, parse
from .static import StaticCodedLayer, StaticLayer
from .stored import Stored
from .view import View

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from .codecs.base import Codec, Encoded
    from .kernels.base import Kernel
    from .placement.base import Place, Placement

__all__ = [
    "CodecConformance",
    "KernelConformance",
    "PlacementConformance",
    "RetentionConformance",
    "StrategyConformance",
    "check_golden",
    "peak_bytes",
    "tiny_llama",
    "walked_bytes",
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# how far two ways to compute the same attention may differ, relative to the largest entry
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# the same examples on every run, and no deadline on machines that are shared
DRAWN = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    # a fixture is a frozen stage or a spec: nothing of it survives an example
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# --------------------------------------------------------------------------------------- builders


def tiny_llama(**overrides: Any) -> LlamaForCausalLM:
    """A random Llama that answers in milliseconds; `overrides` change its config.

    Weights are drawn wide, so that next-token scores lie far apart and depend on what the cache
    holds: equal tokens then mean equal attention, not a flat model.
    """
    settings_ = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return random_model(LlamaConfig(**(settings_ | overrides)))


def random_model(config: Any, seed: int = 0) -> Any:
    """A causal model of this config with random weights, on the CPU, ready for `generate`."""
    from transformers import AutoModelForCausalLM

    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
    finally:
        torch.random.set_rng_state(state)
    model.generation_config.eos_token_id = None  # every run has its full length
    model.generation_config.pad_token_id = 0
    return model


def prompt(length: int, batch: int = 1, seed: int = 0, vocabulary: int = 97) -> Tensor:
    """Token ids [batch, length], none of them 0 (padding)."""
    return torch.randint(1, vocabulary, (batch, length), generator=_seeded(seed))


def left_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """Rows of ids of unlike length as one batch with padding on the left."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat((row.new_zeros(width - len(row)), row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=_seeded(seed)).to(dtype)


def dense(x: Tensor) -> Tensor:
    """What a view holds, as a plain tensor."""
    return x._stored.dense()[x._side] if isinstance(x, View) else x  # neither counted nor logged


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8) if x.numel() else x.reshape(-1)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Two ways to compute one thing agree, as far as `dtype` can."""
    bound = TOLERANCE[dtype] * max(1.0, float(expected.float().abs().max()))
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=bound)


# ------------------------------------------------------------------------------------ measurements


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


# --------------------------------------------------------------------------------------- golden


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
        record = {"codec": repr(codec), "tensors": {k: _to_json(x) for k, x in data.items()}}
        path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    assert path.exists(), f"no golden bytes at {path}: run pytest --regen once and commit the file"
    record = json.loads(path.read_text())
    assert record["codec"] == repr(codec), f"{path} is of {record['codec']}, not {codec!r}"
    stored = {name: _from_json(x) for name, x in record["tensors"].items()}
    assert sorted(stored) == sorted(data)
    for name, x in data.items():
        assert same(x, stored[name]), f"{codec!r}: bytes of {name!r} differ from {path}"
    _assert_within_bound(codec, keys, values, stored)


def _to_json(x: Tensor) -> dict:
    raw = bytes(_bytes(x).tolist())
    return {
        "dtype": str(x.dtype).removeprefix("torch."),
        "shape": list(x.shape),
        "base64": base64.b64encode(raw).decode(),
    }


def _from_json(x: dict) -> Tensor:
    raw = torch.tensor(list(base64.b64decode(x["base64"])), dtype=torch.uint8)
    return raw.view(getattr(torch, x["dtype"])).view(x["shape"])


# ---------------------------------------------------------------------------------------- codec


def _blocks(
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
    keys = _normal(B, H, N, codec.block, Dk, seed=seed)
    keys[..., seed % Dk] *= 12
    values = _normal(B, H, N, codec.block, Dv, seed=seed + 1)
    return keys.to(dtype), values.to(dtype)


def _assert_within_bound(codec: Codec, keys: Tensor, values: Tensor, data: Encoded) -> None:
    """Everything is within the codec's own bound, and the bound itself is a number."""
    for side, x, y, bound in zip(
        ("keys", "values"), (keys, values), codec.decode(data), codec.max_error(data), strict=True
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

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("N", [0, 1, 3])
    @pytest.mark.parametrize(
        ("Dk", "Dv"), [(16, 16), (33, 33), (64, 48), (80, 80), (96, 128), (112, 112), (192, 128)]
    )
    def test_error_within_own_bound(
        self, codec: Codec, dtype: torch.dtype, N: int, Dk: int, Dv: int
    ) -> None:
        """Any float type, any number of blocks, awkward head dims, a silent head."""
        keys, values = _blocks(codec, N=N, Dk=Dk, Dv=Dv, dtype=dtype, seed=N)
        keys[:, 0] = values[:, 0] = 0
        data = codec.encode(keys, values)
        for x in codec.decode(data):
            assert x.dtype in ((dtype,) if codec.lossless else (dtype, torch.float32))
        _assert_within_bound(codec, keys, values, data)

    def test_bound_says_something(self, codec: Codec) -> None:
        """A bound as wide as the data would make every other check empty."""
        keys, values = _blocks(codec)
        for x, bound in zip(
            (keys, values), codec.max_error(codec.encode(keys, values)), strict=True
        ):
            widths = x.amax((-1, -2), keepdim=True) - x.amin((-1, -2), keepdim=True)
            assert (bound <= widths / 2).all()
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
            for x in _blocks(codec, B=1, H=2, N=1, Dk=D, Dv=D, seed=seed)
        )
        _assert_within_bound(codec, keys, values, codec.encode(keys, values))

    @pytest.mark.parametrize("constant", [0.0, 1.0, -2.7, 600.3, 1e-7])
    def test_constant_blocks(self, codec: Codec, constant: float) -> None:
        """No division by a range of zero."""
        keys, values = (torch.full_like(x, constant) for x in _blocks(codec))
        data = codec.encode(keys, values)
        _assert_within_bound(codec, keys, values, data)
        for x in codec.decode(data):
            assert (x.float() - constant).abs().max() <= 2e-3 * abs(constant) + 1e-6

    def test_later_tokens_may_be_larger(self, codec: Codec) -> None:
        """No scale is frozen by the first tokens: larger blocks are as exact, relatively."""
        keys, values = _blocks(codec, N=3)
        factor = torch.tensor([1.0, 100.0, 0.01])[:, None, None]
        data = codec.encode(keys * factor, values * factor)
        _assert_within_bound(codec, keys * factor, values * factor, data)
        for x, bound in zip((keys, values), codec.max_error(data), strict=True):
            bound = bound.expand(x.shape).amax((0, 1, 3, 4))
            assert bound[1] <= 200 * bound[0] + 1e-6
            assert bound[2] <= bound[0] + 1e-6

    def test_large_key_bias(self, codec: Codec) -> None:
        """600 in one key channel (Qwen2) moves all scores alike: attention is as good."""
        if not self.key_bias:
            pytest.skip(f"{codec.name}: says key_bias = False")
        keys, values = _blocks(codec, B=1, H=2, N=4, seed=3)
        query = _normal(1, 2, 5, 64, seed=5)
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
        keys, values = _blocks(codec, N=3, dtype=dtype)
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
        keys, values = _blocks(codec, N=1)
        where = (0, 1, 0, 2, 3)
        keys[where] = values[where] = sign * size
        data = codec.encode(keys, values)
        for x, y, bound in zip(
            (keys, values), codec.decode(data), codec.max_error(data), strict=True
        ):
            error, bound = (y - x).abs(), bound.expand(x.shape)
            assert ((error <= bound * (1 + 1e-6)) | ~y.isfinite()).all()

    def test_blocks_encode_as_they_would_alone(self, codec: Codec) -> None:
        """Append equals at once, byte for byte; so do rows, heads, and input of any stride."""
        keys, values = _blocks(codec, N=3)
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

    def test_axes(self, codec: Codec) -> None:
        """Every tensor is [B, H, N, ...], so that blocks can be sliced; a slice decodes alone."""
        keys, values = _blocks(codec, B=2, H=3, N=4, Dk=48, Dv=32)
        data = codec.encode(keys, values)
        for name, x in data.items():
            assert x.shape[:3] == (2, 3, 4), f"{name!r} is {tuple(x.shape)}"
        whole = codec.decode(data)
        part = codec.decode({name: x[:, :, 1:3] for name, x in data.items()})
        for x, y in zip(whole, part, strict=True):
            assert same(x[:, :, 1:3].contiguous(), y.contiguous())

    def test_input_is_neither_changed_nor_kept(self, codec: Codec) -> None:
        """`encode` is pure: the model's tensors are its own to reuse."""
        keys, values = _blocks(codec)
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
        data = codec.encode(*_blocks(codec))
        own = {x.untyped_storage()._cdata for x in data.values()}
        shared = [x.untyped_storage()._cdata in own for x in codec.decode(data)]
        assert all(shared) if codec.decodes_in_place else not any(shared)

    def test_traces_into_one_graph(self, codec: Codec) -> None:
        """`static` compiles encode and decode with the model."""
        keys, values = _blocks(codec, B=1, H=2, N=1, Dk=32, Dv=32)
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda k, v: codec.decode(codec.encode(k, v)), backend="eager", fullgraph=True
        )
        for x, y in zip(
            compiled(keys, values), codec.decode(codec.encode(keys, values)), strict=True
        ):
            assert same(x.contiguous(), y.contiguous())

    def test_shapes_without_data(self, codec: Codec) -> None:
        """`kvplug.estimate` encodes tensors of the device `meta`."""
        keys, values = _blocks(codec, N=3)
        real, meta = codec.encode(keys, values), codec.encode(keys.to("meta"), values.to("meta"))
        assert {k: (x.shape, x.dtype) for k, x in real.items()} == {
            k: (x.shape, x.dtype) for k, x in meta.items()
        }


# -------------------------------------------------------------------------------------- placement


class PlacementConformance:
    """The contract of `kvplug.Placement`. Override the fixture `placement`."""

    @pytest.fixture
    def placement(self) -> Placement:
        """The placement under test."""
        raise NotImplementedError("override the fixture 'placement'")

    @pytest.fixture
    def place(self, placement: Placement) -> Place:
        """One cache's hold on it."""
        return placement.open()

    def test_repr_and_str_parse_back(self, placement: Placement) -> None:
        """A result can be rebuilt from its record."""
        assert parse(repr(placement)).placement == placement
        assert parse(str(placement)).placement == placement

    @pytest.mark.parametrize(
        "dtype", [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32]
    )
    @pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 1), (2, 3, 0, 7), (0, 3, 5, 7)])
    def test_room_keeps_what_is_written(
        self, place: Place, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> None:
        """Any type and shape, 0 rows included; what comes back is what went in."""
        cpu = torch.device("cpu")
        room = place.empty(shape, dtype, cpu)
        assert (room.shape, room.dtype) == (shape, dtype)
        x = torch.randint(0, 100, shape, generator=_seeded(0)).to(dtype)
        room.copy_(x)
        assert same(place.fetch({"x": room}, cpu)["x"], x)
        assert place.fetch({"x": room}, cpu)["x"].device == cpu

    def test_rooms_are_apart(self, placement: Placement, place: Place) -> None:
        """No two pieces of room share a byte: within a cache, between caches, and after a copy."""
        cpu = torch.device("cpu")
        places = [place, place, placement.open(), copy.deepcopy(place)]
        rooms = [p.empty((1, 2, 3, 4), torch.float32, cpu) for p in places]
        for i, room in enumerate(rooms):
            room.fill_(i)
        assert [float(room.mean()) for room in rooms] == [0, 1, 2, 3]

    def test_fetch_copies_only_where_it_must(self, place: Place) -> None:
        """What the device can read where it lies is not copied, slices neither."""
        cpu = torch.device("cpu")
        room = place.empty((1, 2, 8, 4), torch.float32, cpu)
        got = place.fetch({"x": room[:, :, 2:5]}, cpu)["x"]
        assert got.untyped_storage()._cdata == room.untyped_storage()._cdata

    def test_prefetch_gives_the_same_or_nothing(self, place: Place) -> None:
        """A head start changes no content."""
        cpu = torch.device("cpu")
        room = place.empty((1, 2, 8, 4), torch.float32, cpu).copy_(_normal(1, 2, 8, 4, seed=0))
        early = place.prefetch({"x": room}, cpu)
        if early is None:
            return
        assert same(place.fetch(early, cpu)["x"], room)

    def test_room_without_data(self, place: Place) -> None:
        """`kvplug.estimate` asks for room on the device `meta`."""
        room = place.empty((1, 2, 1 << 20, 1 << 20), torch.float32, torch.device("meta"))
        assert room.device.type == "meta"

    def test_buffer_over_it(self, place: Place) -> None:
        """Rows are appended, dropped, reordered and copied, as blocks of a layer are."""
        buffer = Buffer(place, torch.device("cpu"), 1)
        rows = _normal(2, 3, 40, 4, seed=1)
        expected = rows[:, :, :0]
        for i in range(0, 40, 5):
            buffer.append({"x": rows[:, :, i : i + 5]})
            expected = torch.cat((expected, rows[:, :, i : i + 5]), 2)
            if i % 10 == 5:
                buffer.drop_first(3)
                buffer.drop_last(1)
                expected = expected[:, :, 3:-1]
            assert same(buffer.read()["x"].contiguous(), expected.contiguous())
        twin = copy.deepcopy(buffer)
        buffer.map(lambda x: x.flip(0))
        assert same(buffer.read()["x"].contiguous(), expected.flip(0))
        assert same(twin.read()["x"].contiguous(), expected.contiguous())

    def test_generation_is_that_of_dynamic_cache(self, placement: Placement) -> None:
        """Where blocks lie changes no token."""
        model, ids = tiny_llama(), prompt(21, batch=2)
        strategy = Strategy(Full(), Growing(), Exact(block=4), placement, Reference())
        plain = model.generate(ids, max_new_tokens=12, do_sample=False)
        ours = model.generate(
            ids,
            max_new_tokens=12,
            do_sample=False,
            past_key_values=build(strategy, model.config),
        )
        assert torch.equal(ours, plain)


# -------------------------------------------------------------------------------------- the oracle


class Oracle:
    """One layer's cache as its contract describes it, written with `DynamicLayer` and indices only.

    It keeps every token ever seen, exact, and says which columns a query may see. `error` holds how
    far each stored token may be from exact; `follow` widens it as the layer encodes blocks.
    """

    def __init__(self, retention: Retention, padding: Tensor) -> None:
        self.retention, self.padding = retention, padding
        self.exact = DynamicLayer()
        self.keys_error: Tensor | None = None  # [B, H, T, Dk]
        self.values_error: Tensor | None = None
        self.encoded = (0, 0)  # columns that are encoded now

    @property
    def seen(self) -> int:
        return self.exact.get_seq_length()

    def update(self, keys: Tensor, values: Tensor) -> None:
        self.exact.update(keys, values)
        new = [torch.zeros_like(x) for x in (keys, values)]
        if self.keys_error is None:
            self.keys_error, self.values_error = new
        else:
            self.keys_error = torch.cat((self.keys_error, new[0]), 2)
            self.values_error = torch.cat((self.values_error, new[1]), 2)

    def follow(self, layer: Any) -> None:
        """Widen the error of the blocks encoded since the last call, by the codec's bound."""
        begin, end, data = encoded_columns(layer)
        if data is not None and end > self.encoded[1]:
            codec = layer.strategy.codec
            n = (end - max(begin, self.encoded[1])) // codec.block
            bounds = codec.max_error({name: x[:, :, -n:] for name, x in data.items()})
            for error, bound in zip((self.keys_error, self.values_error), bounds, strict=True):
                shape = (*error.shape[:2], n, codec.block, error.shape[-1])
                error[:, :, end - n * codec.block : end] += bound.expand(shape).flatten(2, 3)
        self.encoded = (begin, end)

    def first_visible(self, seen: int | None = None) -> int:
        """The oldest column that the next query may see."""
        seen, newest = self.seen if seen is None else seen, self.retention.newest
        return 0 if newest is None else max(0, seen - (newest - 1) - self.retention.first)

    def visible(self, first: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Keys and values from column `first` on, each with its error; and which are pins."""
        columns = torch.arange(first, self.seen).expand(len(self.padding), -1).clone()
        pinned = torch.zeros_like(columns, dtype=torch.bool)
        if self.retention.first and first > 0:
            for row, padding in enumerate(self.padding.tolist()):
                if first > padding:
                    n = self.retention.first
                    columns[row, :n] = torch.arange(padding, padding + n)
                    pinned[row, :n] = True

        def take(x: Tensor) -> Tensor:
            return x.gather(2, columns[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))

        sides = [
            (take(x), take(error).masked_fill(pinned[:, None, :, None], 0.0))
            for x, error in (
                (self.exact.keys, self.keys_error),
                (self.exact.values, self.values_error),
            )
        ]
        return sides, pinned

    def crop(self, n: int) -> None:
        if n and self.seen:
            n = min(n, self.seen)
            keep = self.seen - n
            self.exact.crop(-n)
            self.keys_error = self.keys_error[:, :, :keep]
            self.values_error = self.values_error[:, :, :keep]
            # a cut block returns to the tail as it was stored: a later one adds its own error
            self.encoded = (min(self.encoded[0], keep), min(self.encoded[1], keep))

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.seen:
            self.exact.keys, self.exact.values = change(self.exact.keys), change(self.exact.values)
            self.keys_error, self.values_error = change(self.keys_error), change(self.values_error)
            self.padding = change(self.padding)


def encoded_columns(layer: Any) -> tuple[int, int, Encoded | None]:
    """The first column that lies in an encoded block, the first after these, and the blocks."""
    if isinstance(layer, StaticCodedLayer) and layer.is_initialized:
        n = int(layer.block_count)
        blocks = {name: x[:, :, :n] for name, x in layer.blocks.items()}
        return 0, n * layer.strategy.codec.block, blocks if n else None
    if isinstance(layer, Layer) and layer.is_initialized:
        data = layer.blocks.read() if len(layer.blocks) else None
        return layer._first_stored(), layer._tail_start(), data
    return 0, 0, None


def _one_layer(strategy: Strategy, padding: Tensor | None = None, limit: int = 256) -> Any:
    """A layer of this strategy, keys never rotated."""
    if strategy.layout.name == "static" and strategy.layout.limit is None:
        strategy = strategy.replace(
            layout=dataclasses.replace(strategy.layout, max_cache_len=limit)
        )
    config = LlamaConfig(num_hidden_layers=1, rope_parameters=None)
    config.rope_parameters = None
    layer = build(strategy, config).layers[0]
    if padding is not None and isinstance(layer, Layer):
        layer.set_padding(padding)
    return layer


def _kept_whole(retention: Retention, length: int) -> bool:
    """Whether nothing of `length` tokens is dropped."""
    if isinstance(retention, Scored):
        return length < retention.budget + retention.every
    return retention.newest is None or length <= retention.first + retention.newest


STEP = st.one_of(
    st.tuples(st.just("update"), st.sampled_from([1, 1, 1, 2, 3, 5, 8, 13, 20])),
    st.tuples(st.just("update"), st.just(1)),
    st.tuples(st.just("crop"), st.sampled_from([0, 1, 2, 5, 9, 30])),
    st.tuples(st.just("record"), st.just(0)),
    st.tuples(st.just("reorder"), st.integers(0, 5)),
    st.tuples(st.just("select"), st.integers(0, 5)),
    st.tuples(st.just("mask"), st.integers(0, 5)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("copy"), st.just(0)),
    st.tuples(st.just("reset"), st.just(0)),
)


class _Machine:
    """Runs drawn steps on a layer and its oracle, and compares them after each."""

    def __init__(self, strategy: Strategy, padding: list[int]) -> None:
        self.strategy = strategy
        self.start = torch.tensor(padding)
        self.layer = _one_layer(strategy, self.start)
        self.oracle = Oracle(strategy.retention, self.start)
        self.since_settled = self.seed = 0
        self.recording = False

    def run(self, steps: list[tuple[str, int]]) -> None:
        for name, n in steps:
            if name in ("reorder", "select", "mask", "repeat") and not self.oracle.seen:
                continue  # there are no rows yet
            getattr(self, name)(n)
            self.compare()

    def update(self, S: int) -> None:
        oracle, layer = self.oracle, self.layer
        limit = layer.strategy.layout.limit
        B = len(oracle.padding)
        self.seed += 1
        keys = _normal(B, 2, S, 8, seed=self.seed)
        values = _normal(B, 2, S, 6, seed=-self.seed)
        if limit is not None and oracle.seen + S > limit:
            with pytest.raises(CacheOverflow):
                layer.update(keys, values)
            return
        first = oracle.first_visible()
        length, offset = layer.get_mask_sizes(S)
        before = int(layer.get_seq_length())
        got = layer.update(keys.clone(), values.clone())
        assert before == oracle.seen
        oracle.update(keys, values)
        self.since_settled = self.since_settled + S if self.recording else 0
        assert offset == first
        sides, _ = oracle.visible(first)
        for x, (exact, error) in zip(got, sides, strict=True):
            assert x.shape[:2] == exact.shape[:2]
            assert x.shape[2] == length
            plain = dense(x)[:, :, : exact.shape[2]]  # a static layer returns empty room behind
            assert length in (exact.shape[2], limit)
            self.check(plain, exact, error)
            assert same(plain[:, :, -S:].contiguous(), exact[:, :, -S:]), "this call's own tokens"
        oracle.follow(layer)
        codec = self.strategy.codec
        if isinstance(layer, (Layer, StaticCodedLayer)) and not self.recording:
            begin, end, _ = encoded_columns(layer)
            if getattr(layer, "blocked", True):
                assert oracle.seen - max(end, begin) <= codec.tail + codec.block - 1

    def crop(self, n: int) -> None:
        oracle = self.oracle
        left = max(0, oracle.seen - n)
        try:
            self.layer.crop(-n)
        except Evicted:
            assert n > self.since_settled, "nothing since the last settled call can be gone"
            assert oracle.first_visible(left) < oracle.first_visible(), "nothing needed was gone"
            return
        oracle.crop(n)
        self.since_settled = 0
        oracle.follow(self.layer)

    def record(self, _: int) -> None:
        if hasattr(self.layer, "activate_past_recording"):
            self.layer.activate_past_recording()
            self.recording = True

    def reorder(self, seed: int) -> None:
        B = len(self.oracle.padding)
        order = torch.randint(0, B, (B,), generator=_seeded(seed))
        self.layer.reorder_cache(order)
        self.oracle.map(lambda x: x[order])

    def select(self, seed: int) -> None:
        B = len(self.oracle.padding)
        order = torch.randperm(B, generator=_seeded(seed))[: max(1, B - seed % 2)]
        self.layer.batch_select_indices(order)
        self.oracle.map(lambda x: x[order])

    def mask(self, seed: int) -> None:
        B = len(self.oracle.padding)
        keep = torch.rand(B, generator=_seeded(seed)) < 0.8
        keep[seed % B] = True
        self.layer.batch_select_indices(keep)
        self.oracle.map(lambda x: x[keep])

    def repeat(self, repeats: int) -> None:
        if len(self.oracle.padding) * repeats <= 6:
            self.layer.batch_repeat_interleave(repeats)
            self.oracle.map(lambda x: x.repeat_interleave(repeats, 0))

    def copy(self, _: int) -> None:
        """Go on with the copy; what happens to the original must not matter."""
        old, self.layer = self.layer, copy.deepcopy(self.layer)
        limit = old.strategy.layout.limit
        if self.oracle.seen and (limit is None or self.oracle.seen < limit):
            B = len(self.oracle.padding)
            old.update(torch.full((B, 2, 1, 8), 9.0), torch.full((B, 2, 1, 6), 9.0))

    def reset(self, _: int) -> None:
        self.layer.reset()
        # as many rows next time: a static layer keeps its room, and with it the batch
        padding = torch.zeros_like(self.oracle.padding)
        self.oracle = Oracle(self.strategy.retention, padding)
        self.since_settled = 0

    def compare(self) -> None:
        layer, oracle = self.layer, self.oracle
        assert int(layer.get_seq_length()) == oracle.seen
        if oracle.seen == 0:
            return
        first = oracle.first_visible()
        assert layer.held() == oracle.seen - first
        sides, _ = oracle.visible(first)
        for x, (exact, error) in zip((layer.keys, layer.values), sides, strict=True):
            if layer.strategy.layout.limit is not None:
                x = x[:, :, : exact.shape[2]]
            self.check(x, exact, error)

    def check(self, x: Tensor, exact: Tensor, error: Tensor) -> None:
        assert x.shape == exact.shape
        assert x.dtype == exact.dtype
        over = (x - exact).abs() - error * (1 + 1e-6)
        # two roundings to float32 on top where a token was encoded at all
        slack = torch.where(error > 0, 1e-6, 0.0)
        assert (over <= slack).all(), f"{float(over.max()):.3g} above the bound"


# -------------------------------------------------------------------------------------- retention


class RetentionConformance:
    """The contract of `kvplug.Retention` and `kvplug.Scored`. Override the fixture `retention`.

    Use a small budget (tens of tokens): the tests go a few times beyond it.
    """

    @pytest.fixture
    def retention(self) -> Retention:
        """The retention under test."""
        raise NotImplementedError("override the fixture 'retention'")

    @pytest.fixture
    def strategy(self, retention: Retention) -> Strategy:
        """It alone, all else exact."""
        return Strategy(retention, Growing(), Exact(), Device(), Reference())

    @pytest.fixture
    def budget(self, retention: Retention) -> int:
        """Most tokens held between two calls; 32 stand for no limit."""
        if isinstance(retention, Scored):
            return retention.budget + retention.every
        return 32 if retention.newest is None else max(2, retention.first + retention.newest - 1)

    def test_repr_and_str_parse_back(self, retention: Retention) -> None:
        """A result can be rebuilt from its record."""
        assert parse(repr(retention)).retention == retention
        assert parse(str(retention)).retention == retention

    @pytest.mark.parametrize("chunk", [1, 3, 7])
    def test_what_is_seen_and_what_is_held(
        self, retention: Retention, strategy: Strategy, budget: int, chunk: int
    ) -> None:
        """Masks, shapes and counts agree at every step; the call's own tokens are all there, exact.

        What is held consists of tokens that came, in the order they came; positional retention
        holds exactly the first and the newest that it says.
        """
        layer = _one_layer(strategy)
        came: list[int] = []
        for step in range(0, 4 * budget, chunk):
            new = list(range(step, step + chunk))
            came += new
            # token i is the number i, in every channel of its values
            values = torch.tensor(new, dtype=torch.float32)[None, None, :, None].expand(2, 3, -1, 4)
            length, offset = layer.get_mask_sizes(chunk)
            k, v = layer.update(_normal(2, 3, chunk, 8, seed=step), values)
            assert k.shape == (2, 3, length, 8)
            assert v.shape == (2, 3, length, 4)
            assert offset + length == len(came) == layer.get_seq_length()
            assert same(dense(v)[:, :, -chunk:].contiguous(), values.contiguous())
            held = layer.values[..., 0]  # [B, H, T]
            assert held.shape[-1] == layer.held() == layer.get_mask_sizes(1)[0] - 1
            assert (held.diff(dim=-1) > 0).all(), "out of order"
            assert len(came) < budget or layer.held() <= max(budget, 0) or retention.newest is None
            if isinstance(retention, Scored):
                assert layer.held() < retention.budget + retention.every
                if len(came) < retention.budget + retention.every:
                    assert layer.held() == len(came)
            elif retention.newest is None:
                assert held[0, 0].tolist() == came
            else:
                first, newest = retention.first, retention.newest - 1
                kept = (
                    came
                    if len(came) <= first + newest
                    else came[:first] + came[len(came) - newest :]
                )
                assert (held == torch.tensor(kept, dtype=torch.float32)).all()

    def test_prompt_is_read_in_full(self, strategy: Strategy, budget: int) -> None:
        """Eviction comes after attention: the first forward of a long prompt is exact."""
        model, ids = tiny_llama(), prompt(3 * budget)
        with torch.no_grad():
            exact = model(ids, past_key_values=DynamicCache(config=model.config)).logits
            ours = model(ids, past_key_values=build(strategy, model.config)).logits
        assert_close(ours, exact)

    def test_within_the_budget_nothing_is_lost(
        self, retention: Retention, strategy: Strategy, budget: int
    ) -> None:
        """As long as all fits, tokens are those of `DynamicCache`."""
        n = budget // 2
        if n < 2:
            pytest.skip(f"{retention}: a budget of {budget} fits nothing")
        model, ids = tiny_llama(), prompt(n, batch=2)
        new = {"max_new_tokens": budget - n, "do_sample": False}
        plain = model.generate(ids, **new)
        ours = model.generate(ids, past_key_values=build(strategy, model.config), **new)
        assert torch.equal(ours, plain)

    def test_memory_is_bounded(self, retention: Retention, strategy: Strategy, budget: int) -> None:
        """Bytes after ten budgets are those after five."""
        if not isinstance(retention, Scored) and retention.newest is None:
            pytest.skip(f"{retention}: keeps everything")
        layer, sizes = _one_layer(strategy), []
        for step in range(10 * budget):
            layer.update(_normal(1, 2, 1, 8, seed=step), _normal(1, 2, 1, 8, seed=step))
            sizes.append(walked_bytes(layer))
        half = len(sizes) // 2
        assert max(sizes[half:]) <= max(sizes[:half])
        # idle room in front and behind is at most what is held, and a few rows
        assert max(sizes) <= (3 * budget + 64) * 2 * 2 * 8 * 4

    def test_left_padded_rows_are_as_alone(self, strategy: Strategy, budget: int) -> None:
        """Rows of unlike length overflow at different times; each is as it would be alone."""
        if isinstance(strategy.retention, Scored):
            pytest.skip(f"{strategy.retention}: chooses in steps of the batch; see the next test")
        model = tiny_llama()
        rows = [prompt(n, seed=n)[0] for n in (budget + 5, 3, budget // 2 + 1, budget + 2)]
        new = {"max_new_tokens": 2 * budget, "do_sample": False}
        together = model.generate(
            **left_padded(rows), cache_implementation=f"{PREFIX}{strategy!r}", **new
        )
        for row, out in zip(rows, together, strict=True):
            alone = model.generate(row[None], cache_implementation=f"{PREFIX}{strategy!r}", **new)
            assert out[-2 * budget :].tolist() == alone[0, -2 * budget :].tolist()

    def test_padding_goes_first(self, strategy: Strategy, budget: int) -> None:
        """A padding token is held only beside all real tokens of its row."""
        padding = torch.tensor([0, budget, budget // 2])
        together, alone = _one_layer(strategy, padding), _one_layer(strategy)
        for i in range(4 * budget):
            keys = _normal(3, 2, 1, 8, seed=i)
            values = torch.full((3, 2, 1, 4), float(i))  # token i is the number i
            together.update(keys, values)
            alone.update(keys[:1], values[:1])
            assert same(together.values[:1].contiguous(), alone.values)
            held = together.values[..., 0]  # [B, H, T]
            is_padding = held < padding[:, None, None]
            real = (i + 1 - padding).clamp_min(0)[:, None]
            kept_real = (~is_padding).sum(-1)
            assert ((is_padding.sum(-1) == 0) | (kept_real >= real)).all() or (
                strategy.retention.newest is not None  # a window counts columns: masks do the rest
            )

    @pytest.mark.parametrize("recording", [False, True])
    def test_crop(self, strategy: Strategy, budget: int, recording: bool) -> None:
        """While the past is recorded, a rollback leaves no trace; else it is right or `Evicted`."""
        for removed in (1, 2, budget // 2, budget):
            layers = [_one_layer(strategy) for _ in range(2)]
            for layer in layers:
                layer.update(
                    _normal(1, 2, 2 * budget, 8, seed=0), _normal(1, 2, 2 * budget, 8, seed=1)
                )
            if recording:
                layers[0].activate_past_recording()
            extra = _normal(1, 2, removed, 8, seed=2)
            layers[0].update(extra, extra)
            try:
                layers[0].crop(-removed)
            except Evicted:
                assert not recording
                continue
            one = _normal(1, 2, 1, 8, seed=3)
            if isinstance(strategy.retention, Scored) and not recording:
                continue  # it chose anew with the tokens that are gone
            for a, b in zip(*(layer.update(one, one) for layer in layers), strict=True):
                assert torch.equal(dense(a), dense(b))

    def test_batch_operations_and_reset(self, strategy: Strategy, budget: int) -> None:
        """Rows are independent: reordering them before or after is the same; reset forgets."""
        order = torch.tensor([2, 0, 0, 1])
        keys, values = (_normal(3, 2, 3 * budget, 8, seed=s) for s in (0, 1))
        late, early = _one_layer(strategy), _one_layer(strategy)
        for i in range(0, 3 * budget, 3):
            late.update(keys[:, :, i : i + 3], values[:, :, i : i + 3])
            early.update(keys[order][:, :, i : i + 3], values[order][:, :, i : i + 3])
        late.batch_select_indices(order)
        assert same(late.keys.contiguous(), early.keys.contiguous())
        assert same(late.values.contiguous(), early.values.contiguous())
        late.reset()
        assert late.get_seq_length() == late.held() == 0
        fresh = _one_layer(strategy)
        for a, b in zip(late.update(keys, values), fresh.update(keys, values), strict=True):
            assert torch.equal(dense(a), dense(b))
        assert same(late.values, fresh.values)


# --------------------------------------------------------------------------------------- strategy

GREEDY = {"do_sample": False, "max_new_tokens": 14}
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 3},
    "returned": {"num_beams": 3, "num_return_sequences": 3},
    "sampled sequences": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {"assistant_model": True},
    "chunked prefill": {"prefill_chunk_size": 5},
}


class StrategyConformance:
    """What always holds of a cache, whatever its stages. Override the fixture `spec`.

    Use small blocks, tails and windows, e.g. `"sinks(sinks=2, window=10)+int4(block=8, tail=8)"`.
    Prompts have up to 40 tokens. Override `model` to test on another architecture.
    """

    @pytest.fixture
    def spec(self) -> str:
        """The strategy under test, as a user writes it."""
        raise NotImplementedError("override the fixture 'spec'")

    @pytest.fixture
    def model(self) -> PreTrainedModel:
        """A model with a vocabulary of 97."""
        return tiny_llama()

    # ------------------------------------------------------------------------------- what it says

    @pytest.fixture
    def strategy(self, spec: str) -> Strategy:
        """The strategy, parsed."""
        return parse(spec)

    @pytest.fixture
    def lossless(self, strategy: Strategy, model: PreTrainedModel) -> bool:
        """Whether 64 tokens must be those of `DynamicCache`."""
        return strategy.codec.lossless and _kept_whole(strategy.retention, 64)

    @pytest.fixture
    def run(self, model: PreTrainedModel, spec: str) -> Callable[..., Tensor]:
        """`generate` with the strategy, seeded; `spec=None` for transformers' own default."""

        def generate(ids: Tensor | dict, spec: str | None = PREFIX + spec, **kwargs: Any) -> Any:
            torch.manual_seed(0)
            inputs = ids if isinstance(ids, dict) else {"input_ids": ids}
            return model.generate(**inputs, cache_implementation=spec, **(GREEDY | kwargs))

        return generate

    @pytest.fixture
    def fresh(self, model: PreTrainedModel, spec: str) -> Callable[[], Cache]:
        """A new cache with room for 128 tokens."""
        return lambda: build(spec, model.config, max_cache_len=128)

    def test_parses_back(self, strategy: Strategy) -> None:
        """`repr` and `str` are specs of an equal strategy."""
        assert parse(repr(strategy)) == strategy
        assert parse(PREFIX + str(strategy)) == strategy

    # -------------------------------------------------------------------------------- generation

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("batch", [1, 2])
    def test_generation(
        self, run: Callable, model: PreTrainedModel, lossless: bool, mode: str, batch: int
    ) -> None:
        """Every way to generate runs twice alike; where nothing is lost, as with `DynamicCache`."""
        kwargs = dict(MODES[mode])
        if batch > 1 and ("prompt_lookup_num_tokens" in kwargs or "assistant_model" in kwargs):
            pytest.skip("assisted decoding takes one row")
        if "assistant_model" in kwargs:
            kwargs["assistant_model"] = model if not lossless else tiny_llama(num_hidden_layers=1)
        ids = prompt(23, batch)
        if "prompt_lookup_num_tokens" in kwargs:
            ids = ids[:, :8].repeat(1, 4)  # something to look up
        out = run(ids, **kwargs)
        assert out.shape == (batch * kwargs.get("num_return_sequences", 1), ids.shape[1] + 14)
        assert torch.equal(out, run(ids, **kwargs))
        if lossless:
            assert torch.equal(out, run(ids, spec=None, **kwargs))

    def test_scores_are_finite(self, run: Callable) -> None:
        """No NaN in any step."""
        out = run(prompt(23, 2), output_scores=True, return_dict_in_generate=True)
        assert all(s.isfinite().all() for s in out.scores)
        assert isinstance(out.past_key_values, Cache)

    def test_layout_and_placement_change_no_token(
        self, run: Callable, strategy: Strategy, model: PreTrainedModel
    ) -> None:
        """What is kept and how it is encoded decide the result; where it lies does not."""
        plain = strategy.replace(layout=Growing(), placement=Device())
        assert torch.equal(run(prompt(37)), run(prompt(37), spec=f"{PREFIX}{plain!r}"))

    def test_left_padded_rows_are_as_alone(
        self, run: Callable, strategy: Strategy, spec: str
    ) -> None:
        """Before and after eviction, with rows that overflow at different times.

        Blocks of a lossy codec start with the padding, so there only the longest row, which has
        none, must be the same.
        """
        rows = [prompt(n, seed=n)[0] for n in (29, 5, 16)]
        together = run(left_padded(rows), max_new_tokens=20)
        for row, out in zip(rows if strategy.codec.lossless else rows[:1], together, strict=False):
            assert out[-20:].tolist() == run(row[None], max_new_tokens=20)[0, -20:].tolist()

    def test_eager_and_sdpa_agree(
        self, spec: str, strategy: Strategy, lossless: bool, fresh: Callable
    ) -> None:
        """`eager` reads dense copies, and they are counted; `sdpa` never makes one."""
        outputs, inputs = {}, left_padded([prompt(n, seed=n)[0] for n in (30, 11)])
        for name in ("sdpa", "eager"):
            model = tiny_llama(attn_implementation=name)
            caches = []
            for kwargs in ({}, {"num_beams": 2}, {"prefill_chunk_size": 7}):
                cache = fresh()
                cache.set_padding(inputs["attention_mask"])
                out = model.generate(**inputs, past_key_values=cache, **(GREEDY | kwargs))
                outputs.setdefault(name, []).append(out)
                caches.append(cache)
            one = _one_layer(strategy)
            one.update(*(_normal(1, 2, 40, 8, seed=s) for s in (0, 1)))
            views = isinstance(one.update(*(_normal(1, 2, 1, 8, seed=s) for s in (2, 3)))[0], View)
            for cache in caches:
                materialised = cache.stats()["materialised"]
                assert bool(materialised) == (views and name == "eager"), materialised
                assert bool(cache.stats()["kernels"]) == (views and name == "sdpa")
        if strategy.codec.lossless:  # else a rounding may tip a code over, and soon a token
            for a, b in zip(outputs["sdpa"], outputs["eager"], strict=True):
                assert torch.equal(a, b)
        with torch.no_grad():  # one content, read both ways
            cache, token = fresh(), prompt(1, 2, seed=5)
            cache.set_padding(inputs["attention_mask"])
            model(**inputs, past_key_values=cache)
            mask = torch.cat((inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)), 1)
            a, b = (
                tiny_llama(attn_implementation=name)(
                    token, attention_mask=mask, past_key_values=copy.deepcopy(cache)
                ).logits
                for name in ("sdpa", "eager")
            )
            assert_close(b, a)

    @pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (4, 1)])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_heads_and_dtypes(
        self, spec: str, lossless: bool, heads: int, kv_heads: int, dtype: torch.dtype
    ) -> None:
        """Multi-head, grouped and multi-query attention in each float type."""
        full = tiny_llama(num_attention_heads=heads, num_key_value_heads=kv_heads)
        model = copy.deepcopy(full).to(dtype)
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        caches.append(build(spec, model.config, max_cache_len=64))
        errors = []
        with torch.no_grad():
            for ids in (prompt(33, 2), *prompt(6, 2, seed=1).split(1, 1)):
                best, plain, ours = (
                    m(ids, past_key_values=c).logits.float()
                    for m, c in zip((full, model, model), caches, strict=True)
                )
                assert ours.isfinite().all()
                errors.append([float((x - best).abs().mean()) for x in (plain, ours)])
        # as near to float32 as `DynamicCache` is, in the mean over all logits
        for theirs, own in errors if lossless else errors[:1]:
            assert own <= 1.5 * theirs + 1e-5

    # ------------------------------------------------------------------- lengths, chunks, exactness

    @pytest.mark.parametrize("chunk", [1, 3, 8, 11, 64])
    def test_lengths_and_chunks(
        self, strategy: Strategy, model: PreTrainedModel, fresh: Callable, chunk: int
    ) -> None:
        """Prompts around every block border, fed in odd chunks: counts, masks and shapes agree.

        The first forward is exact whatever the codec; all of them where nothing is lost.
        """
        block = strategy.codec.block if strategy.codec.block <= 16 else 8
        for length in (1, block - 1, block, block + 1, 3 * block + 7):
            if not length:
                continue
            ids = prompt(length, 2, seed=length)
            exact, ours = DynamicCache(config=model.config), fresh()
            lossless = strategy.codec.lossless and _kept_whole(strategy.retention, length)
            with torch.no_grad():
                for i in range(0, length, chunk):
                    part = ids[:, i : i + chunk]
                    a, b = (model(part, past_key_values=c).logits for c in (exact, ours))
                    assert b.isfinite().all()
                    if i == 0 or lossless:
                        assert_close(b, a)
            assert int(ours.get_seq_length()) == length
            assert ours.held() <= length

    def test_masks_counts_and_shapes_agree(self, strategy: Strategy) -> None:
        """`get_mask_sizes` announces what `update` returns, `held` what a query finds."""
        layer, seen = _one_layer(strategy), 0
        for S in (5, 1, 1, 9, 1, 17, 2, *[1] * 12):
            length, offset = layer.get_mask_sizes(S)
            held = layer.held()
            keys, values = layer.update(_normal(2, 2, S, 8, seed=S), _normal(2, 2, S, 6, seed=S))
            seen += S
            assert keys.shape == (2, 2, length, 8)
            assert values.shape == (2, 2, length, 6)
            assert int(layer.get_seq_length()) == seen
            limit = layer.strategy.layout.limit
            assert length in (held + S, limit)
            assert offset == seen - S - held
        limit = layer.get_max_length()
        assert limit == -1 or limit >= layer.held()

    # ------------------------------------------------------------------------- storage and memory

    def test_append_only(self, strategy: Strategy) -> None:
        """A block is encoded once, and its bytes never change while more tokens come."""
        layer, kept = _one_layer(strategy), {}
        for step, S in enumerate((3, 20, 1, 1, 1, 7, 2, *[1] * 40, 13)):
            layer.update(_normal(2, 2, S, 8, seed=step), _normal(2, 2, S, 6, seed=-step))
            begin, end, data = encoded_columns(layer)
            if data is None:
                continue
            for i, column in enumerate(range(begin, end, strategy.codec.block)):
                now = {name: x[:, :, i].clone() for name, x in data.items()}
                before = kept.setdefault(column, now)
                assert all(same(now[name], x) for name, x in before.items()), f"block at {column}"
        if (isinstance(layer, Layer) and not layer.blocked) or type(layer) is StaticLayer:
            assert layer.stats.blocks_encoded == len(kept) == 0
            pytest.skip(f"{strategy}: cuts no blocks")
        assert layer.stats.blocks_encoded >= len(
            kept
        )  # some were dropped before they were seen here
        if strategy.retention.newest is None:
            assert layer.stats.blocks_encoded == len(kept)
        if strategy.codec.tail + strategy.codec.block < layer.held():
            assert kept, "nothing was ever encoded"

    def test_full_precision_stays_within_the_tail(
        self, strategy: Strategy, fresh: Callable, model: PreTrainedModel
    ) -> None:
        """After a generation, at most `tail + block - 1` tokens are not encoded."""
        if strategy.codec.lossless:
            pytest.skip(f"{strategy.codec}: nothing is encoded with loss")
        cache = fresh()
        model.generate(prompt(40), past_key_values=cache, **(GREEDY | {"max_new_tokens": 30}))
        for layer in cache.layers:
            begin, end, _ = encoded_columns(layer)
            assert 69 - max(begin, end) <= strategy.codec.tail + strategy.codec.block - 1

    def test_bytes_are_honest(self, fresh: Callable, model: PreTrainedModel) -> None:
        """`nbytes()` is what the garbage collector finds, at every moment."""
        cache = fresh()
        assert cache.nbytes() == walked_bytes(cache)
        for n in (33, 1, 1, 9, 1):
            with torch.no_grad():
                model(prompt(n, 2), past_key_values=cache)
            assert cache.nbytes() == walked_bytes(cache) > 0
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.crop(0)
        assert cache.nbytes() == walked_bytes(cache)
        cache.reset()
        assert cache.nbytes() == walked_bytes(cache)

    def test_no_dense_copy(self, strategy: Strategy) -> None:
        """A decode step allocates about a block, however much is held.

        Measured over a layer's update and attention in steps one after the other; the median, since
        room grows now and then.
        """
        B, H, D, steps = 1, 2, 32, 7
        retention, codec = strategy.retention, strategy.codec
        whole = _kept_whole(retention, 650)
        held = 600 if whole else _budget(retention)
        layer = _one_layer(strategy, limit=640)
        layer.update(*(_normal(B, H, held, D, seed=s) for s in (0, 1)))
        token = _normal(B, H, 1, D, seed=2)

        def step() -> None:
            length, offset = layer.get_mask_sizes(1)
            visible = torch.arange(offset, offset + length) <= int(layer.get_seq_length())
            sdpa(token, *layer.update(token, token), attn_mask=visible.view(1, 1, 1, length))

        peaks = sorted(peak_bytes(step) for _ in range(steps))
        row = 2 * B * H * D * 4
        cuts = isinstance(layer, StaticCodedLayer) or getattr(layer, "blocked", False)
        # a block being decoded, the pieces of it and the tail being encoded; masks and scores
        allowed = 6 * row * (codec.block + codec.tail if cuts else 1) + 64 * held + 4096
        if allowed > row * held // 2:
            if whole:
                pytest.fail(f"blocks of {codec} are too large for this test")
            pytest.skip(f"{retention}: holds too little to tell a copy from a block")
        assert peaks[steps // 2] <= allowed, f"{peaks} bytes; {row * held} are held"

    # ------------------------------------------------------------------------------ the whole API

    def test_reset_and_use_again(self, fresh: Callable, model: PreTrainedModel) -> None:
        """After `reset` a cache is as new, for shorter and for longer sequences."""
        used = fresh()
        model.generate(prompt(40, 2), past_key_values=used, **GREEDY)
        for n in (9, 50):
            used.reset()
            assert int(used.get_seq_length()) == used.held() == 0
            outs = [
                model.generate(prompt(n, 2, seed=n), past_key_values=c, **GREEDY)
                for c in (used, fresh())
            ]
            assert torch.equal(*outs)

    def test_second_generate_with_the_returned_cache(
        self, run: Callable, model: PreTrainedModel, spec: str, lossless: bool
    ) -> None:
        """Two turns; a cache made by `build` and one made by `generate` are the same."""
        turns = {}
        for name in (None, PREFIX + spec):
            out = run(
                prompt(17),
                spec=name,
                return_dict_in_generate=True,
                max_new_tokens=8,
                max_length=None,
            )
            # the second turn: all that was said, and a new question
            ids = torch.cat((out.sequences, prompt(9, seed=4)), 1)
            if name is not None:
                built = build(spec, model.config, max_cache_len=128)
                first = model.generate(
                    prompt(17), past_key_values=built, **(GREEDY | {"max_new_tokens": 8})
                )
                assert torch.equal(first, out.sequences)
                again = model.generate(
                    ids, past_key_values=built, **(GREEDY | {"max_new_tokens": 8})
                )
                if (
                    out.past_key_values.get_max_length() in (-1,)
                    or not out.past_key_values.is_compileable
                ):
                    limit = parse(spec).layout
                    if limit.name != "static":
                        second = model.generate(
                            ids,
                            past_key_values=out.past_key_values,
                            **(GREEDY | {"max_new_tokens": 8}),
                        )
                        assert torch.equal(second, again)
                turns[name] = again
            else:
                turns[name] = model.generate(
                    ids, past_key_values=out.past_key_values, **(GREEDY | {"max_new_tokens": 8})
                )
        if lossless:
            assert torch.equal(turns[None], turns[PREFIX + spec])

    def test_deepcopy_and_diverge(self, fresh: Callable, model: PreTrainedModel) -> None:
        """Prefixes are reused by copying: what is done to one copy does not reach another."""
        prefix = prompt(26)
        cache = fresh()
        with torch.no_grad():
            model(prefix, past_key_values=cache)
        ends = [torch.cat((prefix, prompt(7, seed=s)), 1) for s in (1, 2, 3)]
        apart = []
        for ids in ends:
            own = fresh()
            with torch.no_grad():
                model(prefix, past_key_values=own)
            apart.append(model.generate(ids, past_key_values=own, **GREEDY))
        for ids, expected in zip(ends, apart, strict=True):
            twin = copy.deepcopy(cache)
            assert torch.equal(model.generate(ids, past_key_values=twin, **GREEDY), expected)
        assert twin.stats()["blocks_encoded"] >= cache.stats()["blocks_encoded"]
        assert _storages_of(twin).isdisjoint(_storages_of(cache)), "the copy shares storage"

    @pytest.mark.parametrize("operation", ["reorder", "repeat", "index", "mask"])
    def test_batch_operations(
        self, strategy: Strategy, model: PreTrainedModel, fresh: Callable, operation: str
    ) -> None:
        """Rows are independent: choosing them after or before the prefill is the same."""
        ids, late = prompt(30, 3), fresh()
        change, rows = {
            "reorder": (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
            "repeat": (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
            "index": (lambda c: c.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
            "mask": (lambda c: c.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        }[operation]
        early = fresh()
        with torch.no_grad():
            for i in (0, 15):
                model(ids[:, i : i + 15], past_key_values=late)
                model(ids[rows][:, i : i + 15], past_key_values=early)
            change(late)
            for step in range(12):
                token = prompt(1, len(rows), seed=step)
                a, b = (model(token, past_key_values=c).logits for c in (early, late))
                assert_close(b, a)

    def test_crop_and_go_on(
        self, strategy: Strategy, model: PreTrainedModel, fresh: Callable, lossless: bool
    ) -> None:
        """While the past is recorded a rollback leaves no trace, if `is_croppable`."""
        ids = prompt(30)
        plain, cropped = fresh(), fresh()
        with torch.no_grad():
            for cache in (plain, cropped):
                model(ids, past_key_values=cache)
            cropped.activate_past_recording()
            for step, (guesses, removed) in enumerate([(5, 5), (4, 2), (9, 8), (1, 0), (6, 6)]):
                tokens = prompt(guesses, seed=step)
                model(tokens, past_key_values=cropped)
                cropped.crop(-removed)
                assert (
                    int(cropped.get_seq_length()) == int(plain.get_seq_length()) + guesses - removed
                )
                if guesses > removed:
                    model(tokens[:, : guesses - removed], past_key_values=plain)
                assert cropped.held() == plain.held()
            token = prompt(1, seed=9)
            a, b = (model(token, past_key_values=c).logits for c in (plain, cropped))
        assert b.isfinite().all()
        # the tokens of one call see each other in full precision, so calls that were cut otherwise
        # may have computed later layers a little differently where the codec loses something
        if strategy.codec.lossless and _kept_whole(strategy.retention, 40):
            assert_close(b, a)
        keys = [c.layers[0].keys for c in (plain, cropped)]
        if (
            plain.is_croppable
            and strategy.retention.newest is None
            and not isinstance(strategy.retention, Scored)
        ):
            assert torch.equal(keys[0][:, :, :30], keys[1][:, :, :30])
        with pytest.raises(ValueError, match=r"positive|minus"):
            cropped.crop(5)

    @given(
        steps=st.lists(STEP, min_size=3, max_size=24),
        padding=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    )
    @settings(DRAWN, max_examples=40)
    def test_any_sequence_of_operations(
        self, spec: str, steps: list[tuple[str, int]], padding: list[int]
    ) -> None:
        """Drawn operations on a layer against transformers' `DynamicLayer`.

        Exact where the codec is; else each token within the sum of the bounds of the blocks it was
        encoded in; the tail, pins and the call's own tokens always exact.
        """
        strategy = parse(spec)
        if isinstance(strategy.retention, Scored):
            pytest.skip(f"{strategy.retention}: chooses by content; see RetentionConformance")
        _Machine(strategy, padding).run([("update", 6), *steps, ("update", 1)])

    # ----------------------------------------------------------------- callers, configs and threads

    def test_nothing_of_the_caller_is_changed(
        self, model: PreTrainedModel, spec: str, strategy: Strategy
    ) -> None:
        """Neither `cache_config` nor the generation config: the same call again gives the same."""
        name = strategy.codec.name
        arguments = {"block": strategy.codec.block}
        before = dict(arguments)
        others = "+".join(repr(s) for s in strategy.stages() if s.kind != "codec")
        rest = ", ".join(
            f"{f.name}={getattr(strategy.codec, f.name)!r}"
            for f in dataclasses.fields(strategy.codec)
            if f.name != "block"
        )
        config = GenerationConfig(
            cache_implementation=f"{PREFIX}{others}+{name}({rest})",
            cache_config=arguments,
            **GREEDY,
        )
        as_dict = config.to_dict()
        outs = [model.generate(prompt(33), generation_config=config) for _ in range(2)]
        assert torch.equal(*outs)
        assert arguments == before
        assert config.to_dict() == as_dict
        assert config.cache_config is arguments or config.cache_config == before
        spelled = model.generate(prompt(33), cache_implementation=PREFIX + spec, **GREEDY)
        assert torch.equal(outs[0], spelled)

    def test_two_threads_do_not_meet(self, model: PreTrainedModel, spec: str) -> None:
        """Two threads with two strategies get what each gets alone."""
        specs = [PREFIX + spec, "int4(block=8, tail=0)"]
        ids = prompt(31)
        alone = [model.generate(ids, cache_implementation=s, **GREEDY) for s in specs]
        together: dict[int, list[Tensor]] = {0: [], 1: []}

        def work(i: int) -> None:
            for _ in range(2):
                together[i].append(model.generate(ids, cache_implementation=specs[i], **GREEDY))

        threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        for i in (0, 1):
            assert len(together[i]) == 2, "a thread failed"
            assert all(torch.equal(out, alone[i]) for out in together[i])

    def test_stats_are_a_record(self, fresh: Callable, model: PreTrainedModel) -> None:
        """Plain types, and the strategy in them parses back."""
        cache = fresh()
        model.generate(prompt(33), past_key_values=cache, **GREEDY)
        stats = json.loads(json.dumps(cache.stats()))
        assert parse(stats["strategy"]) == cache.strategy
        assert stats["resolved_kernel"] in cache.stats()["kernels"] or not stats["kernels"]
        assert set(stats["kernels"]) <= {stats["resolved_kernel"]}


def _budget(retention: Retention) -> int:
    """Most tokens held between two calls."""
    if isinstance(retention, Scored):
        return retention.budget + retention.every - 1
    return retention.first + retention.newest - 1


def _storages_of(root: object) -> set[int]:
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


# ----------------------------------------------------------------------------------------- kernel


def random_stored(
    codec: Codec,
    *,
    B: int = 1,
    H: int = 2,
    N: int = 3,
    R: int = 5,
    F: int = 0,
    Dk: int = 16,
    Dv: int = 16,
    skip: int = 0,
    empty: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Stored:
    """A layer's content: F pinned tokens, N blocks less `skip` tokens, R in the tail."""
    keys, values = _blocks(codec, B=B, H=H, N=N, Dk=Dk, Dv=Dv, dtype=dtype, seed=seed)

    def pair(n: int, salt: int) -> tuple[Tensor, Tensor]:
        return (
            _normal(B, H, n, Dk, seed=seed + salt, dtype=dtype),
            _normal(B, H, n, Dv, seed=seed + salt + 1, dtype=dtype),
        )

    blocks = codec.encode(keys, values) if N else {}
    return Stored(codec, pair(F, 11) if F else None, blocks, skip if N else 0, pair(R, 21), empty)


def expected_attention(
    query: Tensor, stored: Stored, mask: Tensor | None, scale: float | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Output [B, Q, S, Dv] and log-sum-exp [B, Q, S], in float64 over the dense tensors."""
    keys, values = (x.double() for x in _dense_of(stored))
    G = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(G, 1) for x in (keys, values))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query.double() @ keys.transpose(-1, -2) * scale
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    if stored.empty:  # nothing attends to room that is only reserved, whatever the mask says
        scores[..., -stored.empty :] = -torch.inf
    weights = scores.softmax(-1).nan_to_num(0.0)  # a row of -inf alone: NaN
    return weights @ values, scores.logsumexp(-1)


def _dense_of(stored: Stored) -> tuple[Tensor, Tensor]:
    """Decoded keys and values in column order, in float64, without help of `Stored`."""
    sides = []
    decoded = stored.codec.decode(stored.blocks) if stored.blocks else None
    for side in (0, 1):
        tail = stored.tail[side].double()
        parts = [stored.head[side].double()] if stored.head else []
        if decoded is not None:
            parts.append(decoded[side].double().flatten(2, 3)[:, :, stored.skip :])
        empty = tail.new_zeros(*tail.shape[:2], stored.empty, tail.shape[-1])
        sides.append(torch.cat([*parts, tail, empty], 2))
    return sides[0], sides[1]


class KernelConformance:
    """The contract of `kvplug.Kernel`. Override the fixture `kernel`, and `codecs` it must read."""

    @pytest.fixture
    def kernel(self) -> Kernel:
        """The kernel under test."""
        raise NotImplementedError("override the fixture 'kernel'")

    @pytest.fixture
    def codecs(self) -> list[Codec]:
        """Codecs with small blocks."""
        return [
            parse(spec).codec
            for spec in (
                "exact(block=4)",
                "int8(block=8)",
                "int4(block=8, group=8)",
                "int2(block=16)",
                "int8(block=8, k_bits=8, v_bits=4)",
            )
        ]

    def check(
        self,
        kernel: Kernel,
        query: Tensor,
        stored: Stored,
        mask: Tensor | None = None,
        scale: float | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """One call against float64 over dense tensors."""
        before = {name: x.clone() for name, x in stored.blocks.items()}
        out, lse = kernel.attend(query, stored, mask, scale, is_causal)
        expected, expected_lse = expected_attention(query, stored, mask, scale, is_causal)
        assert (out.dtype, out.shape) == (query.dtype, expected.shape)
        assert (lse.dtype, lse.shape) == (torch.float32, expected_lse.shape)
        assert_close(out, expected, query.dtype)
        hidden = expected_lse == -torch.inf
        assert torch.equal(lse == -torch.inf, hidden)
        assert not out[hidden].any()
        assert_close(lse[~hidden], expected_lse[~hidden]) if (~hidden).any() else None
        assert all(same(stored.blocks[name], x) for name, x in before.items())
        return out, lse

    @given(data=st.data())
    @settings(DRAWN, max_examples=120)
    def test_against_dense_attention(self, kernel: Kernel, codecs: list[Codec], data: Any) -> None:
        """Masks, query lengths, head groups and dims; pinned and hidden tokens, empty room."""
        draw = data.draw
        codec = draw(st.sampled_from(codecs))
        N, R = draw(st.integers(0, 3)), draw(st.integers(0, 9))
        F, empty = draw(st.integers(0, 3)), draw(st.sampled_from([0, 0, 5]))
        skip = draw(st.integers(0, codec.block - 1)) if N else 0
        if N * codec.block - skip + R + F + empty == 0:
            R = 1
        B, H, G = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
        S = draw(st.sampled_from([1, 1, 2, 5]))
        Dk, Dv = draw(st.sampled_from([(8, 8), (16, 24), (24, 16), (64, 64), (80, 80), (40, 8)]))
        dtype = draw(st.sampled_from(DTYPES))
        seed = draw(st.integers(0, 1000))
        stored = random_stored(
            codec,
            B=B,
            H=H,
            N=N,
            R=R,
            F=F,
            Dk=Dk,
            Dv=Dv,
            skip=skip,
            empty=empty,
            dtype=dtype,
            seed=seed,
        )
        T = stored.length
        query = _normal(B, H * G, S, Dk, seed=seed + 5, dtype=dtype)
        kind = draw(st.sampled_from(["none", "causal", "bool", "additive", "row", "heads"]))
        mask = None
        if kind not in ("none", "causal"):
            shape = {"row": (1, 1, S, T), "heads": (B, H * G, S, T)}.get(kind, (B, 1, S, T))
            mask = torch.rand(shape, generator=_seeded(seed)) < 0.6
            if kind in ("additive", "heads"):
                lowest = torch.tensor(
                    draw(st.sampled_from([-math.inf, -math.inf, -3.0])), dtype=dtype
                )
                mask = torch.where(mask, torch.zeros((), dtype=dtype), lowest)
        scale = draw(st.sampled_from([None, None, 0.3]))
        self.check(kernel, query, stored, mask, scale, kind == "causal")

    @pytest.mark.parametrize("length", [1, 7, 8, 9, 16])
    @pytest.mark.parametrize("tail", [0, 1])
    def test_block_borders(self, kernel: Kernel, length: int, tail: int) -> None:
        """Lengths around a block, with and without a tail."""
        codec = parse("int8(block=8)").codec
        N = -(-length // 8)
        stored = random_stored(codec, N=N, R=tail, skip=N * 8 - length)
        assert stored.length == length + tail
        self.check(kernel, _normal(1, 4, 1, 16, seed=1), stored)

    def test_query_that_sees_nothing(self, kernel: Kernel) -> None:
        """Zeros and -inf, never NaN; the other rows are not touched by it."""
        stored = random_stored(parse("int8(block=8)").codec, F=2)
        mask = torch.ones(1, 1, 3, stored.length, dtype=torch.bool)
        mask[:, :, 1] = False
        query = _normal(1, 4, 3, 16, seed=1)
        for m in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
            out, lse = self.check(kernel, query, stored, m)
            assert not out[:, :, 1].any()
            assert (lse[:, :, 1] == -torch.inf).all()
            assert out[:, :, ::2].any()

    def test_nothing_stored(self, kernel: Kernel) -> None:
        """No column at all: zeros and -inf."""
        stored = random_stored(parse("int8(block=8)").codec, N=0, R=0)
        out, lse = kernel.attend(_normal(1, 4, 1, 16, seed=1), stored, None, None, False)
        assert out.shape == (1, 4, 1, 16)
        assert not out.any()
        assert (lse == -torch.inf).all()

    def test_large_scores(self, kernel: Kernel) -> None:
        """Scores of several hundred neither overflow nor lose the winner."""
        stored = random_stored(parse("int8(block=8)").codec, N=4, R=6)
        self.check(kernel, 200 * _normal(1, 4, 2, 16, seed=1), stored)

    def test_outputs_are_their_own(self, kernel: Kernel) -> None:
        """A later call does not overwrite what an earlier one returned."""
        stored = random_stored(parse("int8(block=8)").codec)
        first, first_lse = kernel.attend(_normal(1, 4, 1, 16, seed=1), stored, None, None, False)
        kept, kept_lse = first.clone(), first_lse.clone()
        kernel.attend(_normal(1, 4, 1, 16, seed=2), stored, None, None, False)
        assert torch.equal(first, kept)
        assert torch.equal(first_lse, kept_lse)

    def test_partial_results_merge(self, kernel: Kernel) -> None:
        """Log-sum-exp is right: two halves merged by it give the whole."""
        codec = parse("exact(block=4)").codec
        whole = random_stored(codec, N=4, R=6)
        query = _normal(1, 4, 1, 16, seed=1)
        left = dataclasses.replace(whole, tail=tuple(x[:, :, :0] for x in whole.tail))
        right = dataclasses.replace(whole, blocks={})
        parts = [kernel.attend(query, half, None, None, False) for half in (left, right)]
        weights = torch.stack([lse for _, lse in parts]).softmax(0)[..., None]
        merged = sum(w * out for w, (out, _) in zip(weights, parts, strict=True))
        assert_close(merged, kernel.attend(query, whole, None, None, False)[0])
