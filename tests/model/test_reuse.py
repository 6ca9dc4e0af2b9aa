"""A store beside `generate` on the real model."""

import pytest
import torch

import kvplug

SPECS = ["growing", "int4"]
NEW = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("spec", SPECS)
def test_warm_is_cold(real, text, spec, tmp_path):
    """A chunk of 256 is reused, and `growing` says what a call without a store says."""
    model, ids = real[0], text[None, :360]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given = {"cache_implementation": spec, "return_dict_in_generate": True, "output_logits": True}
    store = kvplug.Store(tmp_path.as_uri())
    cold, warm = (
        model.generate(**inputs, **NEW, **given, cache_config={"store": store}) for _ in range(2)
    )
    assert store.stats()["reused_tokens"] >= 256
    assert torch.equal(warm.sequences, cold.sequences)
    assert all(map(torch.equal, warm.logits, cold.logits))
    if spec == "growing":
        assert torch.equal(warm.sequences, model.generate(**inputs, **NEW))
