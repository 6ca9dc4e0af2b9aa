"""Rows appended in place, dropped at both ends: against a plain list."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug.layers.buffer import Buffer
from kvplug.layers.newest import Newest
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
        st.tuples(
            st.sampled_from(["append", "first", "last", "map", "pick", "copy"]), st.integers(0, 40)
        ),
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
        elif name == "pick" and expected:
            chosen = list(range(n % len(expected), len(expected), 2))
            buffer.pick(torch.tensor(chosen).expand(2, 3, -1))
            expected = [expected[i] for i in chosen]
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


def test_each_head_picks_its_own_rows_and_room_for_more_stays():
    buffer = Buffer(OnDevice(), CPU, 4)
    buffer.append({"k": torch.arange(2 * 3 * 20.0).view(2, 3, 20)})
    buffer.append({"k": torch.zeros(2, 3, 1)})
    buffer.drop_first(5)
    before, room = buffer.read()["k"].clone(), buffer.capacity - buffer.start
    chosen = torch.stack([torch.randperm(15)[:11].sort().values for _ in range(6)]).view(2, 3, 11)
    held = buffer.read()["k"]
    buffer.pick(chosen)
    assert torch.equal(buffer.read()["k"], before.gather(2, chosen))
    assert torch.equal(held, before), "what was read has changed"
    assert buffer.capacity == room > 11
    buffer.pick(chosen[..., :0])
    assert len(buffer) == 0


def test_picked_rows_keep_the_graph_of_those_held():
    rows_ = torch.arange(12.0).view(1, 2, 6).requires_grad_()
    buffer = Buffer(OnDevice(), CPU, 4)
    buffer.append({"k": rows_})
    buffer.pick(torch.tensor([[[0, 2], [3, 5]]]))
    buffer.read()["k"].sum().backward()
    assert rows_.grad.tolist() == [[[1, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 1]]]


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["append", "keep", "last", "map", "load"]), st.integers(0, 9)),
        max_size=40,
    )
)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_the_newest_rows_against_a_list(steps):
    newest, expected, count = Newest(), [], 0
    for name, n in steps:
        if name == "append":
            newest.append(rows(n + 1, count), 6)
            expected += range(max(count, count + n - 5), count + n + 1)
            count += n + 1
        elif name == "keep":
            newest.keep(n)
            expected = expected[len(expected) - min(n, len(expected)) :]
        elif name == "last":
            n = min(n, len(expected))
            newest.drop_last(n)
            expected = expected[: len(expected) - n]
        elif name == "map":
            newest.map(lambda x: x.flip(0))
        else:
            newest.load(newest.read())
        assert len(newest) == len(expected)
        if n % 2:  # pieces are joined only when they are read
            assert content(newest) == expected
    assert content(newest) == expected
