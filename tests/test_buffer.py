"""Rows appended in place, dropped at both ends: against a plain list."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug.layers.buffer import Buffer
from kvplug.placement.device import OnDevice

CPU = torch.device("cpu")


def rows(n, start=0):
    x = torch.arange(start, start + n, dtype=torch.float32)[None, None, :, None]
    return {"k": x.expand(2, 3, n, 4).contiguous(), "v": -x.expand(2, 3, n, 2).contiguous()}


def content(buffer):
    read = buffer.read()
    if not read:
        return []
    assert torch.equal(read["k"][..., 0], -read["v"][..., 0])
    assert (read["k"] == read["k"][:1, :1, :, :1]).all()
    return read["k"][0, 0, :, 0].tolist()


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["append", "first", "last", "map", "copy"]), st.integers(0, 40)),
        max_size=40,
    ),
    unit=st.sampled_from([1, 4, 16]),
    reserve=st.sampled_from([0, 0, 50]),
)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_against_a_list(steps, unit, reserve):
    buffer, expected, count = Buffer(OnDevice(), CPU, unit, reserve), [], 0
    for name, n in steps:
        if name == "append" and n:
            buffer.append(rows(n, count))
            expected += range(count, count + n)
            count += n
        elif name == "first":
            n = min(n, len(expected))
            buffer.drop_first(n)
            expected = expected[n:]
        elif name == "last":
            n = min(n, len(expected))
            buffer.drop_last(n)
            expected = expected[: len(expected) - n]
        elif name == "map" and expected:
            buffer.map(lambda x: x.flip(0))
        elif name == "copy":
            buffer = copy.deepcopy(buffer)
        assert len(buffer) == len(expected)
        assert content(buffer) == expected
        if buffer.tensors:
            assert buffer.capacity <= max(3 * len(buffer) + 2 * unit + 40, reserve + unit + 1)
            begin, end = sorted((n % (len(expected) + 1), len(expected) // 2))
            assert buffer.read(begin, end)["k"][0, 0, :, 0].tolist() == expected[begin:end]


def test_a_row_is_copied_a_constant_number_of_times():
    """One by one: growth moves each row about nine times, and reserves an eighth more."""

    class Counting(OnDevice):
        made = 0

        def empty(self, shape, dtype, device):
            Counting.made += shape[2]
            return super().empty(shape, dtype, device)

    buffer = Buffer(Counting(), CPU, 16)
    for i in range(3000):
        buffer.append(rows(1, i))
        assert buffer.capacity <= len(buffer) * 9 // 8 + 17
    assert Counting.made <= 2 * 10 * 3000
    assert content(buffer) == list(range(3000))


def test_append_is_in_place_while_there_is_room():
    buffer = Buffer(OnDevice(), CPU, 16)
    buffer.append(rows(32))
    buffer.append(rows(1, 32))
    address = buffer.tensors["k"].data_ptr()
    for i in range(33, 33 + buffer.capacity - len(buffer)):
        buffer.append(rows(1, i))
    assert buffer.tensors["k"].data_ptr() == address
    buffer.append(rows(1, 99))
    assert buffer.tensors["k"].data_ptr() != address


def test_a_window_slides_without_growing():
    buffer = Buffer(OnDevice(), CPU, 16)
    addresses = set()
    for i in range(500):
        buffer.append(rows(1, i))
        if len(buffer) > 20:
            buffer.drop_first(1)
        addresses.add(buffer.tensors["k"].data_ptr())
        assert buffer.capacity <= 64
    assert content(buffer) == list(range(480, 500))
    assert len(addresses) < 10


def test_reserved_room_is_there_from_the_start_and_stays():
    buffer = Buffer(OnDevice(), CPU, 16, reserve=100)
    buffer.append(rows(3))
    address = buffer.tensors["k"].data_ptr()
    assert buffer.capacity == 100
    buffer.append(rows(97, 3))
    buffer.drop_first(99)
    assert buffer.capacity == 100
    assert buffer.tensors["k"].data_ptr() == address


def test_what_was_read_stays_until_the_next_append():
    buffer = Buffer(OnDevice(), CPU, 1)
    buffer.append(rows(64))
    before = buffer.read(10, 20)["k"]
    kept = before.clone()
    buffer.drop_first(40)
    buffer.drop_last(10)
    assert torch.equal(before, kept)


def test_clear_and_copy():
    buffer = Buffer(OnDevice(), CPU, 4)
    buffer.append(rows(9))
    buffer.drop_first(2)
    twin = copy.deepcopy(buffer)
    buffer.read()["k"].zero_()
    assert content(twin) == [2, 3, 4, 5, 6, 7, 8]
    buffer.clear()
    assert len(buffer) == buffer.capacity == 0
    buffer.append({"k": torch.ones(5, 1, 2, 3)})  # another shape, once empty
    assert len(buffer) == 2
