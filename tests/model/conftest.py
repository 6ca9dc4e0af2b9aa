"""The packaged real model and text, once per run. Everything here is marked `model`."""

from pathlib import Path

import pytest
import torch

from evals.setup import data
from evals.setup import model as packaged

PROMPTS = (
    "The history of the printing press begins",
    "Question: why is the sky blue?\nAnswer:",
    "def fibonacci(n):\n    ",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.model)


@pytest.fixture(scope="session")
def real(threads):
    """The packaged model and its tokenizer, in float32, with as many threads as there are cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    model, tokenizer, _ = packaged.load()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    yield model, tokenizer
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def prompts(real):
    """A left-padded batch of three."""
    return real[1]([*PROMPTS], return_tensors="pt", padding=True)


@pytest.fixture(scope="session")
def text(real):
    """Token ids [T] of the text that every Python carries: the same tests wherever they run."""
    return data.load(data.EMBEDDED).tokens(real[1], need=0)
