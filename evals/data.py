"""The text that drift and speed are measured on: WikiText-2, any dataset or file, or a text every
Python carries.

Line ends are LF, and blank rows of a dataset of lines are dropped: WikiText-2 then reads the same
from the Hub, where its blank lines are empty rows, and from the single file that is passed around
without them.
"""

from __future__ import annotations

import hashlib
import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from huggingface_hub import HfApi, is_offline_mode

from evals.config import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test"
EMBEDDED = "pydoc_data.topics"
READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
TIMEOUT_S = 5  # for the one request that asks whether the Hub answers


@dataclass(frozen=True)
class Corpus:
    """A text, and where it is from."""

    name: str
    text: str
    notice: str | None = None  # what the user must hear about it

    @property
    def fingerprint(self) -> str:
        """The name and the sha256 of the text as it was tokenized."""
        return f"{self.name} sha256:{hashlib.sha256(self.text.encode()).hexdigest()[:16]}"

    def tokens(self, tokenizer: PreTrainedTokenizerBase, need: int) -> torch.Tensor:
        """Return all token ids [N], N >= need; no special tokens, the text is one string."""
        ids = tokenizer(
            self.text, add_special_tokens=False, return_tensors="pt", verbose=False
        ).input_ids[0]
        if len(ids) < need:
            raise ConfigError(
                f"dataset {self.name} has {len(ids):,} tokens, this run needs {need:,}"
            )
        return ids


def load(name: str | None) -> Corpus:
    """Load a local file, a local folder or a Hub dataset.

    Folders and Hub ids may name a configuration and a split: `id:config:split`; the split is `test`
    if it is not said. Without a name it is WikiText-2, or else the embedded text.
    """
    if name is None:
        return _default()
    if name == EMBEDDED:
        return _embedded()
    if (path := Path(name)).is_file():
        reader = READERS.get(path.suffix)
        if reader is None:  # a text: one document, its inner newlines as they are
            data = _load("text", data_files=name, split="train", sample_by="document")
            return Corpus(path.name, "".join(data["text"]))
        return Corpus(path.name, _join(_load(reader, data_files=name, split="train")))
    repo, config, split = (*name.split(":"), "", "")[:3]
    if not Path(repo).is_dir() and (reason := _refusal(repo)):
        raise ConfigError(
            f"dataset {repo!r} is no local file or folder, and the Hub does not give it: {reason}. "
            "HF_HUB_OFFLINE=1 takes a copy that is already in the local cache."
        )
    return Corpus(name, _join(_load(repo, config or None, split=split or "test")))


def _default() -> Corpus:
    """Return WikiText-2 where the Hub gives it; otherwise the embedded text, saying why."""
    try:
        return load(WIKITEXT)
    except Exception as error:  # whatever it is, it goes into the notice
        return _embedded(
            f"No WikiText-2: {_brief(error)} Measuring on the Python language reference that this "
            f"Python carries ({EMBEDDED}) instead: figures compare within this table, not with "
            "published ones. --dataset takes a Hub id or a text file."
        )


def _embedded(notice: str | None = None) -> Corpus:
    topics = pydoc_data.topics.topics
    data = datasets.Dataset.from_dict({"text": [topics[key] for key in sorted(topics)]})
    return Corpus(EMBEDDED, _join(data), notice)


def _load(*args: Any, **kwargs: Any) -> datasets.Dataset:
    """Call `load_dataset`; what it cannot load is the user's to correct."""
    try:
        return datasets.load_dataset(*args, **kwargs)
    except (ValueError, OSError) as error:
        raise ConfigError(f"dataset {kwargs.get('data_files', args[0])!r}: {error}") from error


def _refusal(repo: str) -> str | None:
    """Return why the Hub cannot give a dataset, or None if it can: one request, no retries.

    `load_dataset` alone would retry for minutes. In offline mode it does not ask anyone, and takes
    a cached copy.
    """
    if is_offline_mode():
        return None
    try:
        HfApi().dataset_info(repo, timeout=TIMEOUT_S)
    except Exception as error:  # the HTTP library, and with it the class, differs between versions
        return _brief(error)
    return None


def _brief(error: Exception) -> str:
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {first}"


def _join(data: datasets.Dataset) -> str:
    """Return the text of a dataset of lines or documents, each ending with one newline, blank ones
    dropped.
    """
    if "text" not in data.column_names:
        raise ConfigError(f"the dataset has no column 'text', but {', '.join(data.column_names)}")
    return "".join(row if row.endswith("\n") else row + "\n" for row in data["text"] if row.strip())
