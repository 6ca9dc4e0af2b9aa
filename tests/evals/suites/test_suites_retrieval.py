"""Who reads a text finds the needles in it."""

import json
import random
from dataclasses import replace

import pytest
import tiny_run
import torch

from evals.measure.needles import CHOICES, Haystack
from evals.rows.tables import share
from evals.setup.contenders import EXACT, Contender, resolve
from evals.suites import retrieval

pytestmark = pytest.mark.usefixtures("offline")


def reading(monkeypatch, words, answer):
    """Have `feed` answer by all tokens that a cache, or what it is a copy of, has been fed."""

    def feed(session, cache, tokens):
        cache.said = [*getattr(cache, "said", []), *tokens]
        logits = torch.zeros(len(words.known))
        logits[answer(cache.said)] = 1
        return logits

    monkeypatch.setattr(retrieval, "feed", feed)
    monkeypatch.setattr(retrieval, "account", lambda cache: {"bytes_held": 1, "tokens_held": 1})


def test_one_who_reads_finds_all_and_one_who_guesses_does_not(session, words, monkeypatch):
    """Whoever looks the key up in what was fed is right everywhere: so are places and scores."""
    hay, contender = Haystack(session), session.contenders[0]

    def reader(said):  # the needle: "... KEY is VALUE"
        found = (i for i in range(len(said) - 2) if said[i : i + 2] == said[-2:])
        return said[next(found, 0) + 2]

    reading(monkeypatch, words, reader)
    rows = [row for row in retrieval.measure(session, hay, contender, 200) if "case" in row]
    assert len(rows) == 3 * len(retrieval.DEPTHS)
    assert {row["value"] for row in rows} == {1}
    guess = random.Random(0)
    reading(monkeypatch, words, lambda said: guess.choice(hay.words[1]))
    session.config = replace(session.config, trials=40)
    rows = list(retrieval.measure(session, hay, contender, 200))
    for metric in ("retrieval", "retrieval_asked"):
        found = [row["value"] for row in rows if row["metric"] == metric]
        assert sum(found) / len(found) == pytest.approx(1 / CHOICES, abs=0.08)


def test_a_prompt_is_read_whole_before_anything_goes(session):
    contender = Contender("snapkv(budget=40, every=8, window=8)")
    cache = contender.build(session.model.config, 200)
    retrieval.prompt(session, cache, list(range(100)), 100)
    assert (cache.held(), cache.get_seq_length()) == (40, 100)


@pytest.mark.parametrize(
    "spec", [EXACT, "snapkv(budget=60, every=32, window=8)", "snapkv(budget=60, window=8)+int4"]
)
def test_a_text_that_is_read_once_for_all_questions_answers_as_whole_prompts_do(spec, session):
    (*_, contender) = resolve([spec])
    assert retrieval.waits(contender)
    trial = Haystack(session).trial(200, retrieval.DEPTHS, 0)
    text = retrieval.begun(session, contender, trial, 200)
    for ask in (retrieval.asked, retrieval.answers):
        together = ask(session, contender, trial, 200, text)
        alone = ask(session, contender, trial, 200)
        for one, other in zip(together, alone, strict=True):
            assert one[:3] == other[:3]
            assert one.told.get("retention") == other.told.get("retention")


def test_who_drops_or_encodes_before_the_question_reads_each_prompt():
    names = ("int4", "window(length=64)", "expected(budget=90)", "transformers:quantized")
    assert not any(retrieval.waits(one) for one in resolve(names)[1:])


def test_questions_after_a_text_do_not_help_each_other(session):
    """Each answer is what it would be were it the only one."""
    trial = Haystack(session).trial(200, retrieval.DEPTHS, 0)
    contender = Contender("snapkv(budget=60, every=32, window=8)")
    together = list(retrieval.answers(session, contender, trial, 200))
    for i, question in enumerate(trial.questions):
        alone = trial._replace(questions=[question])
        assert [together[i]] == list(retrieval.answers(session, contender, alone, 200))


def test_a_cache_that_cannot_be_copied_reads_the_text_again(session, add_rival):
    body = (
        "class Stiff(DynamicCache):\n"
        "    def __deepcopy__(self, memo):\n"
        "        raise RuntimeError('no clone()')\n"
        "def build(config, length):\n    return Stiff(config=config)\n"
    )
    add_rival("stiff:cache", body)
    trial = Haystack(session).trial(200, retrieval.DEPTHS, 0)
    exact, stiff = (
        list(retrieval.answers(session, one, trial, 200)) for one in resolve(["stiff:cache"])
    )
    assert [one[:3] for one in stiff] == [one[:3] for one in exact]


def test_retrieval_end_to_end(needles, words, tmp_path, console):
    chosen = "snapkv(budget=60, every=16, window=8)"
    config = replace(needles, strategies=("growing", chosen))
    folder, rows = tiny_run.measured(config, tmp_path / "out", console)
    assert rows[0]["strategy"] == "transformers:dynamic"
    share = {
        (r["strategy"], r["metric"], json.dumps(r["case"])): (r["value"], r["n"])
        for r in rows
        if r["case"]
    }
    assert len(share) == 3 * 2 * 3 * len(retrieval.DEPTHS)
    for (name, metric, case), figure in share.items():
        if name == "growing":
            assert figure == share["transformers:dynamic", metric, case]
    assert {n for _, n in share.values()} == {1}
    for row in rows:
        assert row["stats"]["bytes_held"] > 0
        if row["strategy"] == chosen:
            assert row["stats"]["retention"]["kept"] == [[60] * 2] * 2
    held = {(r["strategy"], r["metric"]): r["value"] for r in rows if r["context"] == 200}
    assert held[chosen, "tokens_held"] == 60
    assert held["growing", "tokens_held"] > 180
    table = (folder / "table.md").read_text()
    assert "words found, asked in the prompt ↑ | words found ↑ |" in table
    assert "**144 tokens**" in table


def test_unseen_asks_after_the_text_alone_and_finds_as_much(needles, words, tmp_path, console):
    chosen = "expected(budget=90, every=16, recent=16)"
    config = replace(needles, strategies=(chosen,), context=(200,))
    _, both = tiny_run.measured(config, tmp_path / "both", console)
    folder, rows = tiny_run.measured(replace(config, suite="unseen"), tmp_path / "one", console)
    assert {row["metric"] for row in rows} == {row["metric"] for row in both} - {"retrieval_asked"}

    def found(rows):
        return [
            (row["strategy"], row["metric"], row["case"], row["value"])
            for row in rows
            if row["metric"] in ("retrieval", "retrieval_greedy")
        ]

    assert found(rows) == found(both)
    held = {row["strategy"]: row["value"] for row in rows if row["metric"] == "tokens_held"}
    assert held[chosen] < 90 + 16 < held[EXACT]
    table = (folder / "table.md").read_text()
    assert "asked in the prompt" not in table
    assert "a head: of the text." in table


def test_shares_of_all_depths_are_one_share():
    rows = [
        {
            "strategy": "a",
            "metric": "retrieval",
            "context": 9,
            "case": {"depth": d},
            "value": v,
            "n": n,
        }
        for d, v, n in ((0, 1.0, 1), (1, 0.5, 3))
    ]
    (row,) = retrieval.pooled(rows)
    assert (row["value"], row["n"], row["case"]) == (2.5 / 4, 4, None)
    assert share(row | {"value": 0.0}, None) == "0.00 (0.00-0.49)"
