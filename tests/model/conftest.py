"""The packaged real model and text, once per run. Everything here is marked `model`."""

import os
from pathlib import Path

import pytest
import torch

from evals.setup import model as packaged

PROMPTS = (
    "The history of the printing press begins",
    "Question: why is the sky blue?\nAnswer:",
    "def fibonacci(n):\n    ",
)
WIKITEXT = Path(__file__).parents[3] / "shared/data/wikitext-2-raw/wiki.test.raw"


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
    """A left-padded batch of four: three prompts, one of them twice."""
    return real[1]([*PROMPTS, PROMPTS[0]], return_tensors="pt", padding=True)


@pytest.fixture(scope="session")
def text(real):
    """Token ids [T] of WikiText-2 raw, test split."""
    path = Path(os.environ.get("KVPLUG_WIKITEXT", WIKITEXT))
    if not path.exists():
        pytest.skip(f"WikiText-2 raw is not at {path}; set KVPLUG_WIKITEXT to wiki.test.raw")
    return real[1](path.read_text(), return_tensors="pt", verbose=False).input_ids[0]
