"""What always holds, over every built-in and a good set of compositions."""

import pytest

import kvplug
from kvplug.testing import StrategyConformance
from kvplug.testing.oracle import Machine

SPECS = [
    "growing",
    "exact(block=8)+host",
    "exact(block=8, tail=8)+disk",
    "static",
    "static+exact(block=8)+host",
    "int8(block=8)",
    "int4(block=8, tail=8)",
    "int2(block=8, tail=16)",
    "int(block=8, tail=8, k_bits=6, v_bits=3)",
    "int4(block=8, tail=8)+int8(block=8)@-1",
    "static+int4(block=8, tail=8)+int8(block=8)@0",
    "static+int8(block=8)@-1",
    "static+int8(block=8)",
    "static+int4(block=8, tail=8)",
    "int8(block=8)+disk",
    "window(length=64)",
    "window(length=9)",
    "window(length=9)+static",
    "window(length=20)+int8(block=8)",
    "sinks(sinks=2, window=10)",
    "sinks(sinks=3, window=20)+int4(block=8, tail=8)",
    "sinks(sinks=4, window=60)+exact(block=8)+host",
    "sinks(sinks=2, window=18)+int8(block=8)+disk",
]


class TestStrategy(StrategyConformance):
    @pytest.fixture(params=SPECS)
    def spec(self, request):
        return request.param


@pytest.mark.parametrize("spec", ["sinks(sinks=3, window=20)+int4(block=8, tail=8)"])
def test_views_outlive_the_blocks_that_come_after_them(spec):
    """Blocks are appended before attention reads what `update` returned: nothing may move.

    With blocks dropped in front, the room for new ones was made by moving the others.
    """
    Machine(kvplug.parse(spec), [0]).run([("update", n) for n in (6, 1, 13, 13, 1)])


@pytest.mark.parametrize(
    "spec",
    [
        "window(length=600)",
        "window(length=600)+int8(block=8)",
        "sinks(sinks=4, window=500)",
        "sinks(sinks=4, window=500)+int4(block=8, tail=8)",
        "window(length=600)+exact(block=8)+host",
    ],
)
def test_a_wide_window_makes_no_dense_copy(spec):
    """Rows leave one by one, and sinks are laid and lifted: nothing rolls."""
    StrategyConformance().test_no_dense_copy(kvplug.parse(spec))
