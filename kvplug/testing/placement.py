"""The contract of a placement."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch

from ..codecs.exact import Exact
from ..compat import cache_argument
from ..factory import build
from ..kernels.reference import Reference
from ..layers.buffer import Buffer
from ..layers.layout import Growing
from ..retention.full import Full
from ..spec import Strategy, parse

if TYPE_CHECKING:
    from ..placement.base import Place, Placement
from .tools import normal, prompt, same, seeded, tiny_llama


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
        x = torch.randint(0, 100, shape, generator=seeded(0)).to(dtype)
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
        room = place.empty((1, 2, 8, 4), torch.float32, cpu).copy_(normal(1, 2, 8, 4, seed=0))
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
        rows = normal(2, 3, 40, 4, seed=1)
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
            **cache_argument(build(strategy, model.config)),
        )
        assert torch.equal(ours, plain)
