"""A model, a tokenizer and a text small enough that a whole run takes seconds; no network."""

from __future__ import annotations

import io
import os
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import pytest
import tiny_run as small
from rich.console import Console

from evals import rivals, suites
from evals.measure import machine
from evals.measure.session import Session
from evals.setup import model as packaged_model
from evals.suites import retrieval

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from evals.setup.config import Config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tiny() -> LlamaForCausalLM:
    """Return a random Llama whose weights are large enough that its predictions are sharp."""
    return small.model()


@pytest.fixture(autouse=True)
def _in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have runs time the machine's memory with little of it."""
    monkeypatch.setattr(machine, "READ", small.READ)


@pytest.fixture
def text() -> str:
    """Return made-up lines, ending in one without a line break."""
    return small.text()


@pytest.fixture
def config(tmp_path: Path, text: str) -> Config:
    """Return a run that takes a second per strategy."""
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    return small.config(str(tmp_path / "book.txt"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: LlamaForCausalLM) -> None:
    """Have runs load the tiny model, and keep every cache of `datasets` in the test's folder."""
    monkeypatch.setattr(packaged_model, "load", lambda name, dtype: small.loaded(tiny))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


NEEDLE_WORDS = [
    f"{a}{b}{c}" for a in ("ba", "ko", "mi", "tu") for b in "lnrs" for c in ("do", "fe", "ga")
]


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch, tiny: LlamaForCausalLM) -> small.Words:
    """Have runs load the tiny model with a tokenizer of words, and return that."""
    tokenizer = small.Words()
    monkeypatch.setattr(packaged_model, "load", lambda *_: (tiny, tokenizer, "tiny sha256:0"))
    return tokenizer


@pytest.fixture
def needles(tmp_path: Path) -> Config:
    """Return a run of the retrieval suite, over made-up words."""
    lines = random.Random(0)
    text = "\n".join(" ".join(lines.choices(NEEDLE_WORDS, k=9)) for _ in range(200))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    asked = {"suite": "retrieval", "context": (144, 200), "batch": (1,), "trials": 1}
    return small.config(str(tmp_path / "book.txt"), **asked)


@pytest.fixture
def session(needles: Config, words: small.Words, console: Console) -> Session:
    """Return the session of that run."""
    return Session.prepare(needles, retrieval.NEEDS, suites.tokens_needed(needles), console)


@pytest.fixture
def console() -> Console:
    """Return a console that is read, not seen: `console.file.getvalue()`."""
    return Console(width=200, file=io.StringIO())


@pytest.fixture
def add_rival(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Return a function that adds a rival as its author would: by a file."""
    folder = tmp_path / "rivals"
    folder.mkdir()
    monkeypatch.setattr(rivals, "__path__", [*rivals.__path__, str(folder)])

    def add(name: str, body: str) -> None:
        source = "from transformers import DynamicCache\n" + body
        (folder / f"{name.replace(':', '_')}.py").write_text(source, encoding="utf-8")

    yield add
    for file in folder.glob("*.py"):  # another test may have another rival of this name
        sys.modules.pop(f"{rivals.__name__}.{file.stem}", None)


@pytest.fixture(scope="session")
def wikitext() -> Path:
    """Return the raw test split of WikiText-2."""
    default = ROOT.parent / "shared" / "data" / "wikitext-2-raw" / "wiki.test.raw"
    path = Path(os.environ.get("KVPLUG_WIKITEXT") or default)
    if not path.is_file():
        pytest.skip("needs wiki.test.raw: set KVPLUG_WIKITEXT to its path")
    return path
