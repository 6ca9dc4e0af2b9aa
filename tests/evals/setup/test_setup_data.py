import hashlib
from pathlib import Path

import datasets
import pytest
from huggingface_hub import HfApi

from evals.setup import data
from evals.setup.config import ConfigError


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def hub(monkeypatch):
    """Return a function that makes the Hub answer, or not."""

    def answers(error: Exception | None) -> None:
        def info(self, repo, timeout):
            assert timeout <= 5, "the question must not take long"
            if error:
                raise error

        monkeypatch.setattr(HfApi, "dataset_info", info)

    return answers


def test_a_text_file_comes_through_unchanged(tmp_path):
    text = "one\n\n two\n\n\nthree, é, no end"
    (tmp_path / "a.raw").write_text(text, encoding="utf-8")
    corpus = data.load(str(tmp_path / "a.raw"))
    assert corpus.text == text
    assert corpus.name == "a.raw"
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert corpus.fingerprint == f"a.raw sha256:{digest[:16]}"


def test_windows_line_ends_become_line_feeds(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n")
    assert data.load(str(tmp_path / "a.txt")).text == "one\ntwo\n"


def test_rows_of_a_folder_are_joined_and_blank_ones_dropped(tmp_path):
    folder = tmp_path / "wiki"
    folder.mkdir()
    rows = datasets.Dataset.from_dict({"text": ["", " = A = \n", "", " text \n", "bare"]})
    rows.to_parquet(folder / "test-00000-of-00001.parquet")
    assert data.load(str(folder)).text == " = A = \n text \nbare\n"
    assert data.load(str(folder / "test-00000-of-00001.parquet")).text == " = A = \n text \nbare\n"


def test_a_dataset_without_text_is_refused_with_its_columns(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\n1,2\n")
    with pytest.raises(ConfigError, match="no column 'text', but question, answer"):
        data.load(str(tmp_path / "a.csv"))


def test_without_a_name_and_without_the_hub_it_is_the_embedded_text_and_says_so(hub):
    hub(ConnectionError("Name or service not known"))
    corpus = data.load(None)
    assert corpus.name == "pydoc_data.topics"
    assert "ConnectionError: Name or service not known" in corpus.notice
    assert "pydoc_data.topics" in corpus.notice
    assert len(corpus.text) > 300_000
    assert data.load("pydoc_data.topics").fingerprint == corpus.fingerprint


def test_without_a_name_and_with_the_hub_it_is_wikitext(hub, monkeypatch):
    hub(None)
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((*args, kwargs["name"], kwargs["split"]))
        return datasets.Dataset.from_dict({"text": ["", " = A = \n"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = data.load(None)
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]
    assert corpus.text == " = A = \n"
    assert corpus.notice is None


def test_a_hub_that_answers_but_does_not_deliver_is_announced_too(hub, monkeypatch):
    hub(None)

    def load_dataset(*args, **kwargs):
        raise OSError("blocked half-way")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "blocked half-way" in data.load(None).notice


def test_a_named_dataset_never_falls_back(hub):
    hub(ConnectionError("Name or service not known"))
    with pytest.raises(ConfigError, match="'no/such' is no local file or folder, and the Hub"):
        data.load("no/such")


def test_the_file_of_wikitext_reads_as_the_rows_of_the_hub_do(wikitext, tmp_path):
    corpus = data.load(str(wikitext))
    assert corpus.text == Path(wikitext).read_text(encoding="utf-8")
    lines = corpus.text.splitlines(keepends=True)
    rows = [row for line in lines for row in ("", line)]  # the Hub's blank lines are empty rows
    folder = tmp_path / "hub"
    folder.mkdir()
    datasets.Dataset.from_dict({"text": rows}).to_parquet(folder / "test.parquet")
    assert data.load(str(folder)).text == corpus.text


@pytest.mark.parametrize("name", data.PRESETS)
def test_a_preset_is_its_dataset_in_its_split(name, hub, monkeypatch):
    hub(None)
    asked = []

    def load_dataset(repo, name, split, streaming):
        asked.append(":".join((repo, name or "", split)))
        return datasets.Dataset.from_dict({"text": ["", "one", "two\n"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = data.load(name, need=2)
    assert asked == [data.PRESETS[name].name] == [corpus.name]
    assert corpus.text == "one\ntwo\n"


def test_of_a_large_preset_only_what_is_needed_is_taken(hub, monkeypatch):
    hub(None)
    taken = []

    def documents():
        for number in range(1000):
            taken.append(number)
            yield {"text": f"document {number:>10}"}

    def load_dataset(*_, streaming, **__):
        assert streaming
        return datasets.IterableDataset.from_generator(documents)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    text = data.load("c4", need=10).text
    assert text == "".join(f"document {number:>10}\n" for number in range(4)), "80 characters"
    assert len(taken) < 10


@pytest.mark.parametrize("name", data.PRESETS)
def test_a_preset_without_the_hub_says_what_is_accepted(name, hub, monkeypatch):
    hub(ConnectionError("Name or service not known"))
    with pytest.raises(ConfigError, match=r"Accepted are wikitext-2, .*, lambada, a Hub id.*pydoc"):
        data.load(name)
    monkeypatch.setattr(data, "is_offline_mode", lambda: True)

    def load_dataset(*_, **__):
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConfigError, match=r"offline mode is enabled\. Accepted are wikitext-2, "):
        data.load(name)


@pytest.mark.parametrize("suffix", [".bin", ".txt", ".csv", ".json", ".parquet"])
def test_a_file_that_is_no_text(tmp_path, suffix):
    path = tmp_path / f"noise{suffix}"
    path.write_bytes(bytes(range(128, 256)) * 20)
    with pytest.raises(ConfigError, match=r"noise\S*': .*A file is .csv, .* or a text in UTF-8"):
        data.load(str(path))
