"""What a layer's width costs: estimated of all layers, measured of some."""

import pytest
import tiny_run

from evals.suites import sensitivity
from kvplug.codecs.widths import BITS

pytestmark = pytest.mark.usefixtures("offline")


def test_every_layer_is_estimated_and_some_are_measured(needles, tmp_path, console):
    config = tiny_run.config(needles.dataset, suite="sensitivity", window=512, windows=1)
    folder, rows = tiny_run.measured(config, tmp_path / "out", console)
    guessed = {
        (r["strategy"], *r["case"].values()): r["value"]
        for r in rows
        if r["metric"] == "kl_estimated"
    }
    true = {r["strategy"]: r["value"] for r in rows if r["metric"] == "kl"}
    true = {place: true[place[0]] for place in guessed if place[0] in true}
    assert len(guessed) == 2 * 2 * len(BITS)  # layers, sides, widths
    assert len(true) == 2 * 2
    for (name, layer, side, bits), cost in guessed.items():
        assert name == sensitivity.lowered(int(layer), int(side), int(bits)).name
        fewer = [x for x in BITS if x < bits]
        if fewer:
            less = sensitivity.lowered(int(layer), int(side), fewer[-1])
            assert cost < guessed[less.name, layer, side, fewer[-1]]
    assert sum(guessed[x] for x in true) == pytest.approx(sum(true.values()), rel=0.7)
    page = (folder / "table.md").read_text(encoding="utf-8")
    assert "| `all` | " in page
    assert page.count("| values | ") == 2
