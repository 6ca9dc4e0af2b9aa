"""What a bit buys: the suite of bits against drift, and how bits are counted."""

import pytest
import tiny_run
import torch

from evals.measure.bits import bits, exact_states
from evals.report.runs import read
from evals.rows.tables import share
from evals.setup.contenders import resolve
from evals.suites import pareto
from kvplug.registry import REGISTRIES

pytestmark = pytest.mark.usefixtures("offline")

WINDOW, CHUNK, HEAD_DIM = 512, 32, 16


@pytest.fixture
def states(tiny):
    (exact,) = resolve([])
    return exact_states(tiny, exact, torch.arange(WINDOW) % 128)


def count(tiny, states, name):
    return bits(tiny, resolve([name])[-1], states, CHUNK)


def test_the_exact_cache_and_what_loses_nothing_hold_sixteen_bits(tiny, states):
    for name in ("transformers:dynamic", "growing", "window(length=999)"):
        held, further = count(tiny, states, name)
        assert held == pytest.approx(16, abs=0.01)
        assert further == pytest.approx(16)


@pytest.mark.parametrize("name", ["int4", "int4(tail=0)", "int(k_bits=3, v_bits=2)+host"])
def test_bits_are_those_of_codes_scales_and_of_tokens_not_encoded(tiny, states, name):
    """int: a float16 scale and zero per block of a channel, a byte per head of a value."""
    codec = resolve([name])[-1].build(tiny.config, WINDOW).strategy.codec
    coded = (codec.k_bits + codec.v_bits + 32 / codec.block + 8 / HEAD_DIM) / 2
    blocks = (WINDOW - codec.first - codec.tail) // codec.block
    exact = 1 - blocks * codec.block / WINDOW
    held, further = count(tiny, states, name)
    assert held == pytest.approx(exact * 16 + (1 - exact) * coded, abs=0.02)
    assert further == pytest.approx(coded, abs=0.01)


def test_single_layers_are_counted_as_what_they_are(tiny, states):
    whole = [count(tiny, states, name).held for name in ("int8", "int8+int2@0", "int2")]
    assert whole[1] == pytest.approx((whole[0] + whole[2]) / 2, abs=0.01)


def test_rows_by_default_are_all_codecs_that_lose_something_and_all_who_quantize():
    made = pareto.strategies()
    assert set(pareto.QUANTIZE) < set(made)
    assert "transformers:static" not in made
    named = {name.partition("(")[0] for name in made if ":" not in name}
    codecs = {name: REGISTRIES["codec"].get(name) for name in REGISTRIES["codec"].names()}
    assert named <= codecs.keys()
    for name in codecs.keys() - named:
        codec = codecs[name]
        assert codec.lossless or any(codec in other.__mro__[1:] for other in codecs.values())
    assert len(resolve(made)) == len(made) + 1


def test_an_interval_of_answers():
    assert share({"value": 0.5, "n": 40}, None) == "0.50 (0.35-0.65)"
    assert share({"value": 1.0, "n": 40}, None) == "1.00 (0.91-1.00)"


def test_pareto_end_to_end(needles, words, tmp_path, console):
    config = tiny_run.config(
        needles.dataset,
        suite="pareto",
        strategies=("growing", "int8", "int2"),
        window=448,
        windows=1,
        new_tokens=200,  # of which int2 encodes some
        trials=1,
    )
    folder, rows = tiny_run.measured(config, tmp_path / "out", console)
    figure = {(r["strategy"], r["metric"], r["case"]): r for r in rows}
    for name in ("transformers:dynamic", "growing"):
        assert figure[name, "kl", None]["value"] < 1e-9
        assert figure[name, "kl_generated", "64-128"]["value"] < 1e-9
        assert figure[name, "retrieval", None]["n"] == len(pareto.DEPTHS)
    for metric in ("kl", "kl_generated"):
        small, large = (figure[name, metric, None]["value"] for name in ("int8", "int2"))
        assert 0 < small < large
    assert 8 < figure["int8", "bits", None]["value"] < 16
    assert figure["control:broken", "kl", None]["value"] > 0.05
    lines = (folder / "table.md").read_text().splitlines()
    order = [line.split("`")[1] for line in lines if line.startswith("| `")]
    assert order[:4] == ["transformers:dynamic", "growing", "int8", "int2"]
    picture = (folder / "front.svg").read_text()
    assert [name in picture for name in (">int8<", ">int2<", ">growing<")] == [True, True, False]
    assert read(folder)[0]["new_tokens"] == 200


def test_more_generated_tokens_than_positions_are_refused(needles, words, tmp_path, console):
    config = tiny_run.config(
        needles.dataset, suite="pareto", strategies=("int8",), window=448, new_tokens=1000
    )
    with pytest.raises(ValueError, match=r"new_tokens=1000: accepted are 1 to 960"):
        tiny_run.measured(config, tmp_path / "out", console)
