"""What always holds, over every built-in and a good set of compositions."""

from itertools import combinations

import pytest

import kvplug
from kvplug.layers.growing import Layer
from kvplug.layers.scored import ScoredLayer
from kvplug.layers.static import StaticLayer
from kvplug.layers.static_coded import StaticCodedLayer
from kvplug.testing import StrategyConformance
from kvplug.testing.oracle import Machine, kept_whole, one_layer
from kvplug.testing.reuse import OPERATIONS
from kvplug.testing.specs import PAIRED, SMALL, composes, cover, strategies
from kvplug.testing.strategy import ASSISTED, CHUNKS, HEADS, MODES
from kvplug.testing.tools import DTYPES

BY_LAYER = [
    "int4(block=8, tail=8)+int8(block=8)@-1",
    "static+int4(block=8, tail=8)+int8(block=8)@0",
    "static+int8(block=8)@-1",
]
STRATEGIES = [*strategies(), *BY_LAYER]
GENERATION = cover(
    lambda row: row.get("batch", 1) == 1 or row.get("mode") not in ASSISTED,
    mode=list(MODES),
    batch=(1, 2),
)
NUMBERS = cover(heads=HEADS, dtype=DTYPES)


class TestStrategy(StrategyConformance):
    """All of the suite; what has a grid of its own over pairs in place of all strategies."""

    @pytest.fixture(params=STRATEGIES)
    def spec(self, request):
        return request.param

    @pytest.mark.parametrize(("spec", "mode", "batch"), GENERATION)
    def test_generation(self, run, model, lossless, mode, batch):
        super().test_generation(run, model, lossless, mode, batch)

    @pytest.mark.parametrize(("spec", "heads", "dtype"), NUMBERS)
    def test_heads_and_dtypes(self, spec, lossless, heads, dtype):
        super().test_heads_and_dtypes(spec, lossless, heads, dtype)

    @pytest.mark.parametrize(("spec", "chunk"), cover(chunk=CHUNKS))
    def test_lengths_and_chunks(self, strategy, model, fresh, chunk):
        super().test_lengths_and_chunks(strategy, model, fresh, chunk)

    @pytest.mark.parametrize(("spec", "operation"), cover(operation=OPERATIONS))
    def test_batch_operations(self, strategy, model, fresh, operation):
        super().test_batch_operations(strategy, model, fresh, operation)


def stages(spec):
    strategy = kvplug.parse(spec)
    return [(x.kind, x.name) for x in strategy.stages() if x.kind != "kernel"]


def met(rows):
    return {frozenset(pair) for row in rows for pair in combinations(row, 2)}


def test_each_two_stages_are_tested_together():
    pairs = [
        [(kind, name), (other, x)]
        for kind, other in combinations([k for k in PAIRED if k != "kernel"], 2)
        for name in PAIRED[kind]
        for x in PAIRED[other]
    ]
    apart = [pair for pair in pairs if not composes(row(pair))]
    assert [dict(pair) for pair in apart] == [{"retention": "snapkv", "layout": "static"}]
    assert met(pair for pair in pairs if pair not in apart) <= met(map(stages, STRATEGIES))


def row(pair):
    return {kind: SMALL[name] if kind == "retention" else name for kind, name in pair}


@pytest.mark.parametrize(
    "rows", [GENERATION, NUMBERS, cover(chunk=CHUNKS), cover(operation=OPERATIONS)]
)
def test_each_stage_meets_each_way_to_use_it_with_loss_and_without(rows):
    """And each two ways each other, but for a batch where transformers takes one row."""
    ways = [set(column) for column in list(zip(*rows, strict=True))[1:]]
    found = met([*stages(spec), *enumerate(given)] for spec, *given in rows)
    for i, column in enumerate(ways):
        for way in column:
            for kind in ("retention", "layout", "codec", "placement"):
                assert {frozenset(((kind, x), (i, way))) for x in PAIRED[kind]} <= found
            whole = [s for s, *given in rows if given[i] == way and lossless(s)]
            assert {dict(stages(s))["retention"] for s in whole} == set(PAIRED["retention"])
    for (i, a), (j, b) in combinations(enumerate(ways), 2):
        for x in a:
            for y in b:
                assert frozenset(((i, x), (j, y))) in found or (x in ASSISTED and y == 2)


def lossless(spec):
    strategy = kvplug.parse(spec)
    return strategy.codec.lossless and kept_whole(strategy.retention, 64)


def test_each_kind_of_layer_is_tested():
    layers = {type(one_layer(kvplug.parse(spec))) for spec in STRATEGIES}
    assert layers == {Layer, ScoredLayer, StaticLayer, StaticCodedLayer}


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
