"""Caches to compare with: the files of evals/rivals, and modules of other distributions."""

import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import LlamaConfig

from evals import rivals
from evals.measure.needles import Haystack
from evals.rivals import _kvpress, kvpress_snapkv
from evals.run import run
from evals.setup.config import ConfigError
from evals.setup.contenders import Outside, resolve
from evals.suites import retrieval

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
        "kvpress:expected",
        "kvpress:snapkv",
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


KVPRESS = """
import contextlib


class SnapKVPress:
    def __init__(self, compression_ratio):
        assert 0 < compression_ratio < 1, compression_ratio

    def __call__(self, model):
        return contextlib.nullcontext()
"""


@pytest.fixture
def kvpress(tmp_path, monkeypatch):
    """An environment with a kvpress that keeps everything."""
    (tmp_path / "kvpress.py").write_text(KVPRESS)
    info = tmp_path / "kvpress-0.5.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvpress\nVersion: 0.5.5\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} -W ignore "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv(_kvpress.VARIABLE, str(python))


def test_kvpress_answers_what_a_cache_would(kvpress, session, monkeypatch):
    """One that keeps everything finds what the exact cache finds, in another process."""
    monkeypatch.setattr(session, "contenders", resolve(["kvpress:snapkv"]))
    monkeypatch.setattr(kvpress_snapkv, "answers", partial(_kvpress.answers, "SnapKVPress", 60))
    hay, (exact, rival) = Haystack(session), session.contenders
    assert isinstance(rival, Outside)
    whole, found = (list(retrieval.measure(session, hay, one, 144)) for one in (exact, rival))
    for ours, theirs in zip(whole, found, strict=True):
        assert ours["metric"] == theirs["metric"]
        if ours["metric"] != "bytes_held":  # of which some are room ahead
            assert ours["value"] == theirs["value"]
        assert theirs["stats"]["kvpress"] == "0.5.5"


def test_without_its_environment_its_row_says_how_to_make_one(session, monkeypatch):
    monkeypatch.delenv(_kvpress.VARIABLE, raising=False)
    (_, rival) = resolve(["kvpress:snapkv"])
    with pytest.raises(RuntimeError, match=r"pip install torch kvpress==0\.5\.5"):
        rival.answers(session.model, [1, 2, 3], [])
    with pytest.raises(ConfigError, match="only suites 'retrieval' and 'unseen'"):
        rival.build(session.model.config, 8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it works here")
def test_offloading_without_a_gpu_says_what_it_needs():
    (_, rival) = resolve(["transformers:offloaded"])
    with pytest.raises(RuntimeError, match="CUDA streams: no CUDA GPU is here"):
        rival.build(LlamaConfig(num_hidden_layers=1), 8)
