"""The suites themselves: each must turn red where the contract is broken."""

import functools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import kvplug
from kvplug.codecs.rotated import Int8
from kvplug.layers.buffer import Buffer
from kvplug.layers.growing import Layer
from kvplug.testing import (
    CodecConformance,
    PlacementConformance,
    RetentionConformance,
    StrategyConformance,
    peak_bytes,
    tiny_llama,
    walked_bytes,
)
from kvplug.testing.oracle import EACH, Machine
from kvplug.testing.tools import normal


@dataclass(frozen=True)
class Good(Int8):
    """int8 under a name that says where it is used."""

    name: ClassVar[str] = "int8"
    block: int = kvplug.option(8, "tokens per block")


class Coarse(Good):
    """Writes 4 bits and claims the error of 8."""

    def encode_side(self, x, side):
        data = super().encode_side(x, side)
        return {n: y & 0xF0 if n == "k_codes" else y for n, y in data.items()}


class Boundless(Good):
    """Claims nothing, so that nothing can be wrong."""

    def max_error(self, data, side):
        return torch.full_like(self.decode_side(data, side), 1e9)


class Silent(Good):
    """Turns NaN into zero."""

    def encode_side(self, x, side):
        return super().encode_side(x.nan_to_num(0, 0, 0), side)


class Leaky(Good):
    """One scale over all blocks."""

    def encode_side(self, x, side):
        data = super().encode_side(x, side)
        scale = data["kv"[side] + "_scale"]
        if scale.shape[2]:
            scale.copy_(scale.amax(2, keepdim=True))
        return data


class Writer(Good):
    """Changes what it is given."""

    def encode_side(self, x, side):
        x.mul_(1.5)
        return super().encode_side(x, side)


class PerToken(Good):
    """Quantizes keys per token: one large channel swamps all others."""

    def encode_side(self, x, side):
        if side == 0:
            scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-8) / 127
            x = (x / scale).round() * scale
        return super().encode_side(x, side)


class Boastful(Good):
    decodes_in_place = True


class OneName(Good):
    """Stores a scale of keys and one of values under one name: the later overwrites the other."""

    def encode_side(self, x, side):
        data = super().encode_side(x, side)
        return data | {"scale": data.pop("kv"[side] + "_scale")}

    def decode_side(self, data, side):
        return super().decode_side(data | {"kv"[side] + "_scale": data["scale"]}, side)


@dataclass(frozen=True)
class Peeking(Good):
    """Gives values the step of the keys that came last."""

    steps: ClassVar[list] = []

    def encode_side(self, x, side):
        data = super().encode_side(x, side)
        if side == 0:
            self.steps.append(float(data["k_scale"].float().mean()))
            return data
        return data | {"v_scale": data["v_scale"] * self.steps[-1]}


suite = CodecConformance()


@pytest.mark.parametrize(
    ("codec", "check"),
    [
        (Coarse(), lambda c: suite.test_error_within_own_bound(c, torch.float32, 3, 64, 48)),
        (Boundless(), suite.test_bound_says_something),
        (
            Silent(),
            lambda c: suite.test_what_is_not_finite_stays_where_it_is_and_shows(
                c, float("nan"), torch.float32
            ),
        ),
        (Leaky(), suite.test_later_tokens_may_be_larger),
        (Leaky(), suite.test_blocks_encode_as_they_would_alone),
        (Writer(), suite.test_input_is_neither_changed_nor_kept),
        (PerToken(), suite.test_large_key_bias),
        (Boastful(), suite.test_decodes_in_place_tells_the_truth),
        (OneName(), suite.test_a_side_knows_nothing_of_the_other),
        (Peeking(), suite.test_a_side_knows_nothing_of_the_other),
    ],
)
def test_a_broken_codec_is_found_out(codec, check):
    check(Good())
    with pytest.raises(AssertionError):
        check(codec)


def test_a_placement_that_shares_room_is_found_out():
    class Shared(kvplug.Place):
        room = torch.zeros(1 << 12, dtype=torch.uint8)

        def empty(self, shape, dtype, device):
            n = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
            return self.room[:n].view(dtype).view(shape)

    class Sharing(kvplug.Placement):
        name = "sharing"

        def open(self):
            return Shared()

    with pytest.raises(AssertionError):
        PlacementConformance().test_rooms_are_apart(Sharing(), Shared())


def test_eviction_before_attention_is_found_out(monkeypatch):
    """The prefill would be read through the window."""
    strategy = kvplug.parse("window(length=9)")
    checks = RetentionConformance()
    checks.test_prompt_is_read_in_full(strategy, 9)
    plain = Layer._visible
    monkeypatch.setattr(
        Layer,
        "_visible",
        lambda self, first, S, graph: plain(self, max(first, self.seen - 9), S, graph),
    )
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        checks.test_prompt_is_read_in_full(strategy, 9)


def test_a_second_encoding_of_a_block_is_found_out(monkeypatch):
    strategy = kvplug.parse("int4(block=8, tail=8)")
    checks = StrategyConformance()
    checks.test_append_only(strategy)
    plain = Layer.update

    def update(self, keys, values, *args, **kwargs):
        out = plain(self, keys, values, *args, **kwargs)
        if len(self.blocks):  # as transformers' QuantizedCache does with all of its history
            opened = self.strategy.codec.decode(self.blocks.read())
            self.blocks.clear()
            self.blocks.append(
                self.strategy.codec.encode(*(x + 0.01 * x.roll(1, -1) for x in opened))
            )
        return out

    monkeypatch.setattr(Layer, "update", update)
    with pytest.raises(AssertionError):
        checks.test_append_only(strategy)


def test_a_dense_copy_is_found_out(monkeypatch):
    checks = StrategyConformance()
    for spec in ("int8(block=8)", "exact(block=8)+host", "growing"):
        checks.test_no_dense_copy(kvplug.parse(spec))
    plain = Layer.update

    def update(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        self.keys.sum()
        return out

    monkeypatch.setattr(Layer, "update", update)
    for spec in ("int8(block=8)", "exact(block=8)+host", "growing"):
        with pytest.raises(AssertionError):
            checks.test_no_dense_copy(kvplug.parse(spec))


def test_peak_counts_what_is_alive_at_once():
    x = torch.zeros(1000)
    assert peak_bytes(lambda: x.view(10, 100)) == 0
    assert peak_bytes(lambda: x + 1) == 4000
    assert peak_bytes(lambda: (x + 1).sum()) in range(4000, 4100)
    assert peak_bytes(lambda: [x + 1, x + 2, x + 3]) == 12000

    def one_after_the_other():
        for _ in range(5):
            y = x + 1
            del y

    assert peak_bytes(one_after_the_other) == 4000


def test_walk_counts_shared_storage_once_and_finds_what_is_hidden():
    x = torch.zeros(1000)

    class Holder:
        __slots__ = ("inside",)

    holder = Holder()
    holder.inside = {"a": [x, x[10:], (x.view(10, 100),)]}
    assert walked_bytes(holder) == 4000
    cache = kvplug.build("int8(block=8)", tiny_llama().config)
    cache.layers[0].update(normal(1, 2, 50, 8, seed=0), normal(1, 2, 50, 8, seed=1))
    honest = walked_bytes(cache)
    assert honest == cache.nbytes()
    cache.layers[1].scratch = torch.zeros(64)  # a forgotten copy
    assert walked_bytes(cache) == honest + 256


reopen_last_block = Layer._reopen_last_block


def _reopen_wrongly(layer):
    reopen_last_block(layer)
    layer.tail.read(0, 8)["k"].zero_()


@pytest.mark.parametrize(
    ("spec", "method", "wrong"),
    [
        ("growing", "crop", lambda self, n: None),
        ("growing", "reorder_cache", lambda self, order: None),
        (
            "int8(block=8)",
            "batch_select_indices",
            lambda self, rows: self.tail.map(lambda x: x[rows]),
        ),
        ("window(length=9)", "get_mask_sizes", lambda self, n: (self.seen + n, 0)),
        ("int4(block=8, tail=0)", "_reopen_last_block", lambda self: _reopen_wrongly(self)),
        # the columns' own tokens in place of the sinks
        (
            "sinks(sinks=2, window=6)",
            "_sinks_at",
            lambda self, i: [self._read(i, i + 2, x) for x in (0, 1)],
        ),
    ],
)
def test_a_broken_layer_is_found_out(monkeypatch, spec, method, wrong):
    """The state machine, with steps that reach each operation."""
    Machine(kvplug.parse(spec), [0, 2, 1]).run(EACH)
    monkeypatch.setattr(Layer, method, wrong)
    with pytest.raises((AssertionError, RuntimeError, IndexError, kvplug.KvplugError)):
        Machine(kvplug.parse(spec), [0, 2, 1]).run(EACH)


load_rows = Buffer.load


def _shares_all(buffer, rows, capacity=0):
    buffer.tensors, buffer.end = dict(rows), next((x.shape[2] for x in rows.values()), 0)


def _shares_blocks(buffer, rows, capacity=0):
    (_shares_all if buffer.steady else load_rows)(buffer, rows, capacity)


@pytest.mark.parametrize("shares", [_shares_all, _shares_blocks])
def test_deepcopy_that_shares_is_found_out(monkeypatch, shares):
    model, spec = tiny_llama(), "int8(block=8)"

    def check():
        fresh = functools.partial(kvplug.build, spec, model.config)
        StrategyConformance().test_deepcopy_and_diverge(fresh, model)

    check()
    monkeypatch.setattr(Buffer, "load", shares)
    with pytest.raises(AssertionError):
        check()
