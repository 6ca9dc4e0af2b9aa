"""Models with a constant in their keys: what is added, that it goes again, and who is widened."""

import math

import pytest
import tiny_run
import torch

from evals.measure.biased import biased, channel
from evals.suites import bias
from kvplug.testing.tools import prompt, tiny_llama

pytestmark = pytest.mark.usefixtures("offline")


def test_a_channel_of_a_period():
    model = tiny_llama()
    angles = model.model.rotary_emb.inv_freq
    assert channel(model, 1e9) == len(angles) - 1
    assert channel(model, 2 * math.pi) == 0
    assert channel(model, 2 * math.pi / float(angles[1])) == 1


def test_a_constant_comes_and_goes():
    model, ids = tiny_llama(), prompt(20)
    projection = model.model.layers[0].self_attn.k_proj
    with torch.no_grad():
        before, seen = model(ids).logits, []
        hook = projection.register_forward_hook(lambda layer, given, keys: seen.append(keys))
        model(ids)
        with biased(model, ids[0], 1, 10):
            assert not torch.equal(model(ids).logits, before)
        hook.remove()
        assert torch.equal(model(ids).logits, before)
    keys, *_, raised = (x.unflatten(-1, (model.config.num_key_value_heads, -1)) for x in seen)
    added = raised - keys
    assert added[..., 1].mean() == pytest.approx(10 * float(keys.square().mean().sqrt()), rel=1e-4)
    added[..., 1] = 0
    assert not added.any()


def test_each_variant_has_its_own_exact_run(needles, tmp_path, console):
    config = tiny_run.config(
        needles.dataset, suite="bias", strategies=("int8", "int4"), window=512, windows=1
    )
    folder, rows = tiny_run.measured(config, tmp_path / "out", console)
    kl = {(r["strategy"], r["case"]): r for r in rows if r["metric"] == "kl"}
    labels = [label for label, _, _ in bias.variants()]
    assert {case for _, case in kl} == set(labels)
    wide = {place for place, row in kl.items() if row["stats"]["widened"]}
    assert wide == {("int4", "mid x10"), ("int4", "mid x100")}
    page = (folder / "table.md").read_text(encoding="utf-8")
    assert " layers wider |" in page
    told = {place for place, row in kl.items() if row["stats"]["swinging"]}
    assert told == wide | {("int8", "mid x10"), ("int8", "mid x100")}
    assert " keys swing |" in page
