"""What is predicted is what is held, of all kinds of strategies that `auto` may take."""

import pytest

import kvplug
from kvplug.compat import output_cache
from kvplug.testing.heads import calibrated


def test_bytes_predicted_are_bytes_held(real, text, tmp_path):
    model, ids = real[0], text[None, :300]
    file = str(tmp_path / "heads.safetensors")
    calibrated(model.config, file)
    strategies = (
        "growing",
        "int8",
        "int4",
        "snapkv(budget=63)",
        "snapkv(budget=150)+int4",
        "expected(budget=150)",
        f"expected(budget=150, heads={file!r})",
    )
    for spec in strategies:
        out = model.generate(
            ids,
            cache_implementation=spec,
            min_new_tokens=8,
            max_new_tokens=8,
            do_sample=False,
            return_dict_in_generate=True,
        )
        size = {"context": 307, "decoded": 7, "dtype": model.dtype}  # the last one is not fed
        predicted = kvplug.estimate(spec, model.config, **size)
        assert output_cache(out).nbytes() == pytest.approx(predicted, rel=0.03), spec
