"""What the tests' runs measure on; run as a script, it is such a run, to be killed.

python tiny_run.py BOOK OUT
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = ["the", "cache", "keeps", "every", "key", "and", "value", "attention", "asks", "for"]


def model() -> LlamaForCausalLM:
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


def text() -> str:
    words = random.Random(0)
    lines = (" ".join(words.choices(WORDS, k=9)) for _ in range(60))
    return "\n".join(lines)


def tokenizer(text: str, **_: object) -> SimpleNamespace:
    """Stand in for a tokenizer: one token per byte."""
    return SimpleNamespace(input_ids=torch.tensor([[byte % 128 for byte in text.encode()]]))


def loaded(lm: LlamaForCausalLM) -> tuple[Any, Any, str]:
    return lm, tokenizer, "tiny sha256:0"


def config(book: str, **changes: Any) -> Any:
    from evals.config import Config

    asked = {
        "dataset": book,
        "strategies": ("transformers:dynamic",),
        "context": (144,),
        "decode_steps": 4,
        "warmup": 1,
        "repeats": 2,
        "new_tokens": 6,
        "windows": 2,
        "window": 192,
        "chunk": 16,
        "skip": 20,
        "threads": 1,
    }
    return Config(**asked | changes)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from rich.console import Console

    import evals.model
    from evals.run import run

    evals.model.load = lambda name, dtype: loaded(model())
    book, out = sys.argv[1:]
    rows = ("transformers:dynamic", "growing", "transformers:static", "kvplug:static")
    run(config(book, suite="drift", strategies=rows), Path(out), Console())
