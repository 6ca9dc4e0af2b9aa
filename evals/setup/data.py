"""The text that drift and speed are measured on: one that the field knows by name, any dataset or
file, or a text every Python carries.

Line ends are LF, and blank rows of a dataset of lines are dropped: WikiText-2 then reads the same
from the Hub, where its blank lines are empty rows, and from the single file that is passed around
without them.
"""

from __future__ import annotations

import hashlib
import pydoc_data.topics
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import datasets
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi, is_offline_mode

from evals.setup.config import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch
    from transformers import PreTrainedTokenizerBase


class Preset(NamedTuple):
    """A dataset that papers name, in the split they report."""

    name: str  # id:config:split on the Hub
    streamed: bool = False  # taken only as far as a run needs, since all of it is gigabytes


PRESETS = {
    "wikitext-2": Preset("Salesforce/wikitext:wikitext-2-raw-v1:test"),
    "wikitext-103": Preset("Salesforce/wikitext:wikitext-103-raw-v1:test", streamed=True),
    # the books of deepmind/pg19 as files: that one is a script, which `datasets` no longer runs
    "pg19": Preset("emozilla/pg19::test", streamed=True),
    "c4": Preset("allenai/c4:en:validation", streamed=True),
    "lambada": Preset("EleutherAI/lambada_openai:default:test"),
}
CHARACTERS = 8  # per token, at most, of a streamed text: English has 4 to 5
EMBEDDED = "pydoc_data.topics"
ACCEPTED = (
    f"Accepted are {', '.join(PRESETS)}, a Hub id[:config[:split]], a local file or folder, and "
    f"{EMBEDDED}, which needs no Hub."
)
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


def load(name: str | None, need: int = 0) -> Corpus:
    """Load a preset, a local file, a local folder or a Hub dataset.

    Folders and Hub ids may name a configuration and a split: `id:config:split`; the split is `test`
    if it is not said. Without a name it is WikiText-2, or else the embedded text. A large preset is
    streamed until there is enough for `need` tokens.
    """
    if name is None:
        return _default(need)
    if name == EMBEDDED:
        return _embedded()
    if name in PRESETS:
        return _hub(*PRESETS[name], need)
    if (path := Path(name)).is_file():
        reader = READERS.get(path.suffix)
        with _loading(name, f"A file is {', '.join(READERS)}, or a text in UTF-8."):
            if reader is None:  # a text: one document, its inner newlines as they are
                args = {"split": "train", "sample_by": "document"}
                data = datasets.load_dataset("text", data_files=name, **args)
                return Corpus(path.name, "".join(data["text"]))
            data = datasets.load_dataset(reader, data_files=name, split="train")
            return Corpus(path.name, _join(data))
    return _hub(name, False, need)


def _hub(name: str, streamed: bool, need: int) -> Corpus:
    """Return the text of `id:config:split`, the id a local folder or one on the Hub."""
    repo, config, split = (*name.split(":"), "", "")[:3]
    if not Path(repo).is_dir() and (reason := _refusal(repo)):
        raise ConfigError(
            f"dataset {repo!r} is no local file or folder, and the Hub does not give it: {reason}. "
            f"{ACCEPTED} HF_HUB_OFFLINE=1 takes a copy that is already in the local cache."
        )
    with _loading(repo, ACCEPTED):
        args = {"name": config or None, "split": split or "test", "streaming": streamed}
        data = datasets.load_dataset(repo, **args)
        return Corpus(name, _first(data, CHARACTERS * need) if streamed else _join(data))


def _default(need: int) -> Corpus:
    """Return WikiText-2 where the Hub gives it; otherwise the embedded text, saying why."""
    try:
        return load("wikitext-2", need)
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


@contextmanager
def _loading(what: str, hint: str = "") -> Iterator[None]:
    """Turn what `datasets` cannot load into an error of the user's to correct."""
    try:
        yield
    except ConfigError:  # which is a ValueError
        raise
    except (ValueError, OSError, DatasetsError) as error:
        # of a file that cannot be read, the cause says why
        error = error.__cause__ or error
        raise ConfigError(f"dataset {what!r}: {error}{hint and '. ' + hint}") from error


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
    """Return the text of a dataset of lines or documents."""
    if "text" not in data.column_names:
        raise ConfigError(f"the dataset has no column 'text', but {', '.join(data.column_names)}")
    return "".join(_ended(data["text"]))


def _first(data: datasets.IterableDataset, characters: int) -> str:
    """Return whole lines or documents of a stream, until there are enough characters."""
    taken: list[str] = []
    for text in _ended(row["text"] for row in data):
        taken.append(text)
        characters -= len(text)
        if characters <= 0:
            break
    return "".join(taken)


def _ended(rows: Iterable[str]) -> Iterable[str]:
    """Yield rows, each ending with a newline, blank ones dropped."""
    return (row if row.endswith("\n") else row + "\n" for row in rows if row.strip())
