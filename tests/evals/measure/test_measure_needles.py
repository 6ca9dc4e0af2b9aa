"""Needles are where they should be."""

import re
from dataclasses import replace

import pytest

from evals.measure.needles import AFTER, CHOICES, TEMPLATES, Haystack
from evals.setup.config import ConfigError
from evals.suites import retrieval

pytestmark = pytest.mark.usefixtures("offline")


def said(words, trial):
    """The text, keys, values and places of its needles, and what its template says."""
    text = words.text(trial.context)
    for says, _ in TEMPLATES:
        tokens = words(says.format(key="KEY")).input_ids[0].tolist()
        pattern = words.text(tokens).replace("KEY", r"(\w+)") + r" (\w+)"
        found = [(*one.groups(), one.start()) for one in re.finditer(pattern, text)]
        if found:
            return text, found, says
    raise AssertionError("no needle")


def test_a_needle_is_at_its_depth_and_its_question_behind(session, words):
    hay, templates = Haystack(session), set()
    for number, depth in enumerate(retrieval.DEPTHS * 3):
        trial = hay.trial(200, (depth,), number)
        (question,) = trial.questions
        assert len(trial.context) + len(question.tokens) + len(question.lead) == 200
        text, ((key, value, at),), says = said(words, trial)
        assert words.text(question.choices[:1]) == value
        lead = words.text(question.lead).split()
        assert lead == says.format(key=key).replace(",", " ,").split()
        assert key in words.text(question.tokens)
        place = at / (len(text) * (1 - AFTER) - (len(says) + 10))
        assert place == pytest.approx(depth, abs=0.08)
        assert len(set(question.choices)) == CHOICES
        templates.add(says)
    assert len(templates) == len(TEMPLATES)


def test_the_last_eighth_holds_no_needle(session, words):
    for number in range(3):
        text, found, _ = said(words, Haystack(session).trial(400, retrieval.DEPTHS, number))
        assert len(found) == len(retrieval.DEPTHS)
        behind = text[found[-1][2] :].split()
        assert len(behind) > AFTER * 400


def test_several_needles_have_keys_and_values_of_their_own(session, words):
    trial = Haystack(session).trial(200, retrieval.DEPTHS, 0)
    _, needles, _ = said(words, trial)
    assert len(needles) == len(trial.questions) == len(retrieval.DEPTHS)
    right = [question.choices[0] for question in trial.questions]
    assert len(set(right)) == len(right)
    assert all(set(right) <= set(question.choices) for question in trial.questions), "distractors"
    values = {words.text([value]) for value in right}
    assert {value for _, value, _ in needles} == values
    keys = {key for key, *_ in needles}
    assert len(keys) == len(right)
    assert not keys & values


def test_trials_are_the_same_for_a_seed_and_others_for_another(session):
    same = [Haystack(session).trial(144, (0.5,), 3) for _ in range(2)]
    assert same[0] == same[1] != Haystack(session).trial(144, (0.5,), 4)
    session.config = replace(session.config, seed=1)
    assert Haystack(session).trial(144, (0.5,), 3) != same[0]


def test_a_length_without_room_and_a_text_without_words_are_refused(session):
    with pytest.raises(ConfigError, match=r"context=50: accepted are \d+ and more, 5 needles, a"):
        Haystack(session).trial(50, retrieval.DEPTHS, 0)
    session.text = "one two one two"
    with pytest.raises(ConfigError, match=r"words of one token .* give another --dataset"):
        Haystack(session).trial(144, (0.5,), 0)
