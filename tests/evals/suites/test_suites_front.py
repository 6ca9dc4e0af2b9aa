"""Memory, words, drift and speed in one table."""

from dataclasses import replace

import pytest
import tiny_run

from evals.setup.config import ConfigError
from evals.setup.contenders import resolve
from evals.suites import front

pytestmark = pytest.mark.usefixtures("offline")
CHOSEN = "snapkv(budget=60, every=16, window=8)+int4"


def test_front_end_to_end(needles, words, tmp_path, console):
    config = replace(needles, suite="front", context=(144,), strategies=(CHOSEN,))
    folder, rows = tiny_run.measured(config, tmp_path / "out", console)
    figure = {(r["strategy"], r["metric"]): r for r in rows if not r["case"]}
    for name in ("transformers:dynamic", CHOSEN):
        for metric in ("bytes_held", "tokens_held", "kl", "top1", "decode"):
            assert (name, metric) in figure
    assert figure[CHOSEN, "tokens_held"]["value"] == 60
    assert figure[CHOSEN, "kl"]["value"] > 0
    exact, chosen = (figure[x, "bytes_held"]["value"] for x in ("transformers:dynamic", CHOSEN))
    assert chosen < 0.6 * exact
    assert "dense" not in str(figure[CHOSEN, "decode"]["stats"]["kernels"])
    lines = [x for x in (folder / "table.md").read_text().splitlines() if x.startswith("| `")]
    assert [x.split("`")[1] for x in lines][:2] == ["transformers:dynamic", CHOSEN]
    assert lines[1].count("(0.") >= 3, "bytes, and two shares with their intervals"


def test_several_contexts_are_refused(needles, session):
    session.config = replace(session.config, suite="front")
    with pytest.raises(ConfigError, match="one context and one batch"):
        next(front.tasks(session))


def test_rows_by_default_can_be_built():
    assert len(resolve(front.DEFAULTS["strategies"])) == len(front.DEFAULTS["strategies"])
