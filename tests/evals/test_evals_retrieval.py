"""Needles are where they should be, and who reads them finds them."""

import json
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_run
import torch

from evals.measure.needles import CHOICES, Haystack
from evals.measure.session import Bench
from evals.report import render as report
from evals.run import run
from evals.setup.config import ConfigError
from evals.suites import retrieval

pytestmark = pytest.mark.usefixtures("offline")

WORDS = [f"{a}{b}{c}" for a in ("ba", "ko", "mi", "tu") for b in "lnrs" for c in ("do", "fe", "ga")]


class Words:
    """Stand in for a tokenizer: one token per word or other character."""

    def __init__(self):
        self.known = {}

    def __call__(self, text, **_):
        parts = re.findall(r" ?\w+|\W", text)
        ids = [self.known.setdefault(part.strip(" ") or part, len(self.known)) for part in parts]
        return SimpleNamespace(input_ids=torch.tensor([ids]))

    def text(self, ids):
        names = {number: part for part, number in self.known.items()}
        return " ".join(names[i] for i in ids)


@pytest.fixture
def config(tmp_path):
    lines = random.Random(0)
    text = "\n".join(" ".join(lines.choices(WORDS, k=9)) for _ in range(200))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    asked = {"suite": "retrieval", "context": (144, 200), "batch": (1,), "trials": 1}
    return tiny_run.config(str(tmp_path / "book.txt"), **asked)


@pytest.fixture
def words(monkeypatch, tiny):
    tokenizer = Words()
    monkeypatch.setattr("evals.setup.model.load", lambda *_: (tiny, tokenizer, "tiny sha256:0"))
    return tokenizer


@pytest.fixture
def bench(config, words, console):
    return Bench.prepare(config, retrieval.NEEDS, console)


def test_a_needle_is_at_its_depth_and_its_question_at_the_end(bench, words):
    hay = Haystack(bench)
    for depth in retrieval.DEPTHS:
        trial = hay.trial(144, (depth,), 0)
        (question,) = trial.questions
        assert len(trial.context) + len(question.tokens) + 1 == 144
        text = words.text(trial.context)
        asked = words.text(question.tokens)
        key = re.search(r"of (\w+) \?", asked)[1]
        answer = words.text(question.choices[:1])
        needle = f"\n The secret word of {key} is {answer} . \n"
        assert text.count(needle) == 1
        place = text.index(needle) / (len(text) - len(needle))
        assert place == pytest.approx(depth, abs=0.05)
        assert asked.endswith(f"The secret word of {key} is")
        assert len(set(question.choices)) == CHOICES


def test_several_needles_have_keys_and_values_of_their_own(bench, words):
    trial = Haystack(bench).trial(200, retrieval.DEPTHS, 0)
    text = words.text(trial.context)
    assert text.count("The secret word") == len(trial.questions) == len(retrieval.DEPTHS)
    right = [question.choices[0] for question in trial.questions]
    assert len(set(right)) == len(right)
    assert all(set(right) <= set(question.choices) for question in trial.questions), "distractors"
    keys = {re.search(r"of (\w+) \?", words.text(q.tokens))[1] for q in trial.questions}
    assert len(keys) == len(right)
    assert not keys & {words.text([value]) for value in right}


def test_trials_are_the_same_for_a_seed_and_others_for_another(bench):
    same = [Haystack(bench).trial(144, (0.5,), 3) for _ in range(2)]
    assert same[0] == same[1] != Haystack(bench).trial(144, (0.5,), 4)
    bench.config = replace(bench.config, seed=1)
    assert Haystack(bench).trial(144, (0.5,), 3) != same[0]


def test_one_who_reads_finds_all_and_one_who_guesses_does_not(bench, words, monkeypatch):
    """Whoever looks the key up in what was fed is right everywhere: so are places and scores."""
    hay, strategy = Haystack(bench), bench.strategies[0]
    fed = {}

    def reader(bench, cache, tokens):
        said = fed[cache] = fed.get(cache, []) + tokens
        logits = torch.zeros(len(words.known))
        for i in range(len(said) - 6):  # the needle: "The secret word of KEY is VALUE"
            if said[i : i + 6] == said[-6:]:
                logits[said[i + 6]] = 1
                return logits
        return logits

    monkeypatch.setattr(retrieval, "feed", reader)
    rows = list(retrieval.measure(bench, hay, strategy, 200))
    assert len(rows) == 2 * 2 * len(retrieval.DEPTHS)
    assert {row["value"] for row in rows} == {1}
    guess = random.Random(0)

    def guesser(bench, cache, tokens):
        return torch.tensor([guess.random() for _ in words.known])

    monkeypatch.setattr(retrieval, "feed", guesser)
    bench.config = replace(bench.config, trials=20)
    rows = list(retrieval.measure(bench, hay, strategy, 200))
    found = [row["value"] for row in rows if row["metric"] == "retrieval"]
    assert sum(found) / len(found) == pytest.approx(1 / CHOICES, abs=0.06)


def test_the_context_is_fed_in_chunks_and_read_from_the_cache(bench):
    built = bench.strategies[0].build(bench.model.config, 200)
    tokens = Haystack(bench).trial(144, (0.5,), 0).context
    logits = retrieval.feed(bench, built, tokens)
    assert built.get_seq_length() == len(tokens)
    with torch.no_grad():
        whole = bench.model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    assert torch.allclose(logits, whole, atol=1e-4)


def test_retrieval_end_to_end(config, words, tmp_path, console):
    config = replace(config, strategies=("growing", "int2"))
    assert run(config, tmp_path / "out", console), console.file.getvalue()
    (folder,) = (tmp_path / "out").iterdir()
    _, _, rows = report.read(folder)
    assert rows[0]["strategy"] == "transformers:dynamic"
    share = {
        (r["strategy"], r["metric"], json.dumps(r["case"])): (r["value"], r["n"]) for r in rows
    }
    assert len(share) == len(rows) == 3 * 2 * 2 * 2 * len(retrieval.DEPTHS)
    for (name, metric, case), figure in share.items():
        if name == "growing":
            assert figure == share["transformers:dynamic", metric, case]
    assert {n for _, n in share.values()} == {1}
    table = (folder / "table.md").read_text()
    assert "share of words found ↑, 1 key**" in table
    assert "share of words found ↑, 5 keys**" in table


def test_a_length_without_room_and_a_text_without_words_are_refused(config, bench, tmp_path):
    with pytest.raises(ConfigError, match=r"context=50: accepted are 1.. and more, 5 needles and"):
        Haystack(bench).trial(50, retrieval.DEPTHS, 0)
    bench.text = "one two one two"
    with pytest.raises(ConfigError, match=r"words of one token .* give another --dataset"):
        Haystack(bench).trial(144, (0.5,), 0)
