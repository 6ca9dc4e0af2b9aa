"""A model, a tokenizer and a text small enough that a whole run takes seconds; no network."""

from __future__ import annotations

import os
import random
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evals import model as packaged_model
from evals import rivals
from evals.config import Config

WORDS = ["the", "cache", "keeps", "every", "key", "and", "value", "attention", "asks", "for"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tiny() -> LlamaForCausalLM:
    """Return a random Llama whose weights are large enough that its predictions are sharp."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def text() -> str:
    """Return made-up lines, ending in one without a line break."""
    words = random.Random(0)
    lines = (" ".join(words.choices(WORDS, k=9)) for _ in range(60))
    return "\n".join(lines)


def tokenizer(text: str, **_: object) -> SimpleNamespace:
    """Stand in for a tokenizer: one token per byte."""
    return SimpleNamespace(input_ids=torch.tensor([[byte % 128 for byte in text.encode()]]))


@pytest.fixture
def config(tmp_path: Path, text: str) -> Config:
    """Return a run that takes a second per strategy."""
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    return Config(
        dataset=str(tmp_path / "book.txt"),
        strategies=("transformers:dynamic",),
        context=144,
        decode_steps=4,
        warmup=1,
        new_tokens=6,
        windows=2,
        window=192,
        chunk=16,
        skip=20,
    )


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: LlamaForCausalLM) -> None:
    """Have runs load the tiny model, and keep every cache of `datasets` in the test's folder."""
    monkeypatch.setattr(
        packaged_model, "load", lambda name, dtype: (tiny, tokenizer, "tiny sha256:0")
    )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def add_rival(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Return a function that adds a rival as its author would: by a file."""
    folder = tmp_path / "rivals"
    folder.mkdir()
    monkeypatch.setattr(rivals, "__path__", [*rivals.__path__, str(folder)])

    def add(name: str, body: str) -> None:
        source = "from transformers import DynamicCache\n" + body
        (folder / f"{name.replace(':', '_')}.py").write_text(source, encoding="utf-8")

    return add


@pytest.fixture(scope="session")
def wikitext() -> Path:
    """Return the raw test split of WikiText-2."""
    default = ROOT.parent / "shared" / "data" / "wikitext-2-raw" / "wiki.test.raw"
    path = Path(os.environ.get("KVPLUG_WIKITEXT") or default)
    if not path.is_file():
        pytest.skip("needs wiki.test.raw: set KVPLUG_WIKITEXT to its path")
    return path
