"""Needles are where they should be."""

import re
from dataclasses import replace

import pytest

from evals.measure.needles import CHOICES, Haystack
from evals.setup.config import ConfigError
from evals.suites import retrieval

pytestmark = pytest.mark.usefixtures("offline")


def test_a_needle_is_at_its_depth_and_its_question_at_the_end(session, words):
    hay = Haystack(session)
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


def test_several_needles_have_keys_and_values_of_their_own(session, words):
    trial = Haystack(session).trial(200, retrieval.DEPTHS, 0)
    text = words.text(trial.context)
    assert text.count("The secret word") == len(trial.questions) == len(retrieval.DEPTHS)
    right = [question.choices[0] for question in trial.questions]
    assert len(set(right)) == len(right)
    assert all(set(right) <= set(question.choices) for question in trial.questions), "distractors"
    keys = {re.search(r"of (\w+) \?", words.text(q.tokens))[1] for q in trial.questions}
    assert len(keys) == len(right)
    assert not keys & {words.text([value]) for value in right}


def test_trials_are_the_same_for_a_seed_and_others_for_another(session):
    same = [Haystack(session).trial(144, (0.5,), 3) for _ in range(2)]
    assert same[0] == same[1] != Haystack(session).trial(144, (0.5,), 4)
    session.config = replace(session.config, seed=1)
    assert Haystack(session).trial(144, (0.5,), 3) != same[0]


def test_a_length_without_room_and_a_text_without_words_are_refused(session):
    with pytest.raises(ConfigError, match=r"context=50: accepted are 1.. and more, 5 needles and"):
        Haystack(session).trial(50, retrieval.DEPTHS, 0)
    session.text = "one two one two"
    with pytest.raises(ConfigError, match=r"words of one token .* give another --dataset"):
        Haystack(session).trial(144, (0.5,), 0)
