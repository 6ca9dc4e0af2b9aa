"""Models of real sizes with random weights."""

import pytest
import torch

from evals.__main__ import main
from evals.setup import model, shapes
from evals.setup.config import ConfigError


@pytest.fixture
def small(monkeypatch):
    tiny = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    tiny |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    monkeypatch.setitem(shapes.SHAPES, "tiny", tiny)
    monkeypatch.setitem(shapes.COMMON, "vocab_size", 300)


def test_the_same_weights_every_time(small):
    (one, tokenizer, what), (two, _, _) = (model.load("shape:tiny", "bfloat16") for _ in range(2))
    assert what == "shape:tiny, random weights of seed 0"
    assert one.dtype == torch.bfloat16
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    text = "Zürich, 9 °C"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_an_unknown_shape_says_the_nearest():
    with pytest.raises(
        ConfigError, match=r"unknown shape 'shape:lama-1b'\. Did you mean 'shape:llama-1b'"
    ):
        model.load("shape:lama-1b", "float32")


def test_help_and_list_name_every_shape(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # lines of help are broken at hyphens
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert main(["list"]) == 0
    for text in (told, " ".join(capsys.readouterr().out.split())):
        assert all(f"shape:{name}" in text for name in shapes.SHAPES)
