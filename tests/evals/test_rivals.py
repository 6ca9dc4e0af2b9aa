"""Caches to compare with: the files of evals/rivals, and modules of other distributions."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from evals import rivals
from evals.run import run
from evals.setup.contenders import resolve

ADAPTER = """
from transformers import DynamicCache


def build(config, max_cache_len):
    return DynamicCache(config=config)
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Return a function that installs a distribution `theirs` with these entry points."""

    def install(**entry_points):
        info = tmp_path / "theirs-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.5\n")
        lines = [f"{name} = {value}\n" for name, value in entry_points.items()]
        (info / "entry_points.txt").write_text("".join(["[kvplug.rivals]\n", *lines]))
        (tmp_path / "theirs_adapter.py").write_text(ADAPTER)
        monkeypatch.syspath_prepend(tmp_path)

    return install


def test_every_file_is_a_row():
    assert {
        "tiny:turboquant",
        "transformers:dynamic",
        "transformers:fp8",
        "transformers:hqq",
        "transformers:offloaded",
        "transformers:quantized",
        "transformers:static",
    } == set(rivals.modules())


def test_a_cache_of_another_distribution_is_measured_like_any_other(
    installed, config, offline, tmp_path, console
):
    installed(theirs_lossless="theirs_adapter")
    config = replace(config, suite="drift", strategies=("theirs:lossless",))
    assert run(config, tmp_path / "out", console)
    (folder,) = (tmp_path / "out").iterdir()
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    kl = {
        row["value"]
        for row in rows
        if (row["strategy"], row["metric"]) == ("theirs:lossless", "kl")
    }
    assert kl == {0.0}
    assert {row["spec"] for row in rows if row["strategy"] == "theirs:lossless"} == {
        "theirs_adapter"
    }
    assert json.loads((folder / "env.json").read_text())["versions"]["theirs"] == "1.5"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("transformers_static", "evals.rivals.transformers_static has the name"),
        ("lossless", "names are WHO_WHAT"),
        ("kvplug_int4", "kvplug and control are ours"),
        ("control_same", "kvplug and control are ours"),
    ],
)
def test_a_name_that_no_rival_can_have_is_left_out_and_said(name, reason, installed):
    before = rivals.modules()
    installed(**{name: "theirs_adapter"})
    with pytest.warns(
        UserWarning, match=f"rival '{name}' from 'theirs_adapter' ignored: .*{reason}"
    ):
        assert rivals.modules() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="it works here")
def test_offloading_without_a_gpu_says_what_it_needs():
    (_, rival) = resolve(["transformers:offloaded"])
    with pytest.raises(RuntimeError, match="CUDA streams: no CUDA GPU is here"):
        rival.build(LlamaConfig(num_hidden_layers=1), 8)
