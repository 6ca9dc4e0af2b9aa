"""What `auto` predicts is what is held."""

import pytest

import kvplug
from kvplug.compat import output_cache


def test_bytes_predicted_are_bytes_held(real, text):
    """As many tokens come one by one as the prediction takes for granted."""
    model, ids = real[0], text[None, :445]
    ask = {"context": 510, "budget": "1GiB", "drift": "medium", "dtype": model.dtype}
    _, int8, *_ = kvplug.recommend(model.config, **ask).options
    out = model.generate(
        ids,
        cache_implementation=int8.spec,
        max_new_tokens=65,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert output_cache(out).nbytes() == pytest.approx(int8.held, rel=0.03)
