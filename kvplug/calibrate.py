"""`kvplug calibrate`: what a model's layers are worth, measured once on a little text."""

from __future__ import annotations

import hashlib
import pydoc_data.topics
from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import calibration
from .errors import KvplugError, SpecError

if TYPE_CHECKING:
    import os

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINDOWS = 2
WINDOW = 2048  # tokens, fewer where the model has fewer positions
# modules, imported when something is measured: `measure` of a model and windows [W, N] returns what
# a stage learns of it, tensors by SECTION.NAME, or raises a KvplugError that says why it cannot
SECTIONS = ("kvplug.codecs.sensitivity", "kvplug.retention.needs")
EMBEDDED = "pydoc_data.topics"  # the language reference that Python carries


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike,
    text: str | None = None,
) -> dict[str, Any]:
    """Measure a model on WINDOWS windows of text, and write what `calibration=path` reads.

    Args:
        model: of transformers, on any device. It is left as it is.
        tokenizer: of the model.
        path: of the file, see `calibration.py`.
        text: enough for 4,096 tokens; None: the language reference of Python.

    Returns what the file says of itself beside its format and model: its text, and why sections are
    `unmeasured`, by name, that this model or windows so short do not allow.

    Raises SpecError where the text is too short, or no section could be measured.
    """
    name = EMBEDDED if text is None else "text"
    if text is None:
        topics = pydoc_data.topics.topics
        text = "\n".join(topics[key] for key in sorted(topics))
    windows = _windows(model, tokenizer, text)
    tensors, unmeasured = {}, {}
    for name_of_module in SECTIONS:
        module = import_module(name_of_module)
        try:
            tensors |= module.measure(model, windows.to(model.device))
        except KvplugError as e:
            unmeasured[module.SECTION] = str(e)
    if not tensors:
        raise SpecError("; ".join(unmeasured.values()))
    about = {
        "text": f"{name} sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}",
        "tokens": windows.numel(),
        "unmeasured": unmeasured,
    }
    calibration.write(path, tensors, model.config, about)
    return about


def _windows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Tokens [WINDOWS, N] of a text."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    n = min(WINDOW, limit or WINDOW)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) < WINDOWS * n:
        raise SpecError(
            f"a text of {len(ids):,} tokens: calibration takes {WINDOWS} windows of {n:,}"
        )
    return ids[: WINDOWS * n].view(WINDOWS, n)
