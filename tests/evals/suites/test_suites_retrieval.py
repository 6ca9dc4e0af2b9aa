"""Who reads a text finds the needles in it."""

import json
import random
from dataclasses import replace

import pytest
import tiny_run
import torch

from evals.measure.needles import CHOICES, Haystack
from evals.suites import retrieval

pytestmark = pytest.mark.usefixtures("offline")


def test_one_who_reads_finds_all_and_one_who_guesses_does_not(session, words, monkeypatch):
    """Whoever looks the key up in what was fed is right everywhere: so are places and scores."""
    hay, contender = Haystack(session), session.contenders[0]
    fed = {}

    def reader(session, cache, tokens):
        said = fed[cache] = fed.get(cache, []) + tokens
        logits = torch.zeros(len(words.known))
        for i in range(len(said) - 6):  # the needle: "The secret word of KEY is VALUE"
            if said[i : i + 6] == said[-6:]:
                logits[said[i + 6]] = 1
                return logits
        return logits

    monkeypatch.setattr(retrieval, "feed", reader)
    rows = list(retrieval.measure(session, hay, contender, 200))
    assert len(rows) == 2 * 2 * len(retrieval.DEPTHS)
    assert {row["value"] for row in rows} == {1}
    guess = random.Random(0)

    def guesser(session, cache, tokens):
        return torch.tensor([guess.random() for _ in words.known])

    monkeypatch.setattr(retrieval, "feed", guesser)
    session.config = replace(session.config, trials=20)
    rows = list(retrieval.measure(session, hay, contender, 200))
    found = [row["value"] for row in rows if row["metric"] == "retrieval"]
    assert sum(found) / len(found) == pytest.approx(1 / CHOICES, abs=0.06)


def test_the_context_is_fed_in_chunks_and_read_from_the_cache(session):
    built = session.contenders[0].build(session.model.config, 200)
    tokens = Haystack(session).trial(144, (0.5,), 0).context
    logits = retrieval.feed(session, built, tokens)
    assert built.get_seq_length() == len(tokens)
    with torch.no_grad():
        whole = session.model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    assert torch.allclose(logits, whole, atol=1e-4)


def test_retrieval_end_to_end(needles, words, tmp_path, console):
    config = replace(needles, strategies=("growing", "int2"))
    folder, rows = tiny_run.measured(config, tmp_path / "out", console)
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
