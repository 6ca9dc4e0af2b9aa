"""Texts that go on under eviction, measured by position."""

from dataclasses import replace

import pytest
import tiny_run

from evals.setup.contenders import resolve
from evals.suites import drift, stream

pytestmark = pytest.mark.usefixtures("offline")


def test_what_is_lost_is_lost_where_it_was_dropped(config, tmp_path, console):
    chosen = "expected(budget=64, every=16, queries=16, recent=16)"
    config = replace(config, suite="stream", strategies=("growing", chosen))
    folder, rows = tiny_run.measured(config, tmp_path / "out", console)
    figure = {(r["strategy"], r["metric"], r["case"]): r for r in rows}
    for case in (None, "20-32", "32-64"):  # 64 tokens and 16 more fit
        assert figure["growing", "kl", case]["value"] == pytest.approx(0, abs=1e-9)
    for case in ("20-32", "32-64"):
        assert figure[chosen, "kl", case]["value"] == pytest.approx(0, abs=1e-9)
    for case in ("64-128", "128-192"):
        assert figure[chosen, "kl", case]["value"] > 1e-4
    assert figure[chosen, "tokens_held", None]["value"] == 64
    assert figure["growing", "tokens_held", None]["value"] == config.window
    stats = figure[chosen, "kl", "128-192"]["stats"]
    assert stats["bytes_held"] == figure[chosen, "bytes_held", None]["value"]
    assert stats["retention"]["kept"] == [[64] * 2] * 2
    assert "control:broken" in {r["strategy"] for r in rows}
    table = (folder / "table.md").read_text()
    assert "KL by position" in table
    assert "top-1 by position" in table


def test_what_is_no_range_of_positions_has_no_column():
    cases = (None, {"layer": 0, "bits": 3}, "256-512")
    rows = [{"strategy": "int4", "metric": "kl", "value": 1e-3, "case": case} for case in cases]
    table = drift.by_range(rows, "kl", "KL")
    assert table.head == ["strategy", "256-512"]
    assert table.body == [["int4", "0.001000"]]


def test_rows_by_default_can_be_built():
    assert len(resolve(stream.DEFAULTS["strategies"])) == len(stream.DEFAULTS["strategies"])
