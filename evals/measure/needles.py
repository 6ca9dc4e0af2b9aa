"""Words hidden in a text, and the questions that ask for them.

The text is the dataset's own, and so are the words. A needle says, in the words of a template, that
a key has a value; values are one token each, so that one forward gives the likelihood of every word
that the answer could be. The last eighth of a text holds no needle: what a method keeps because it
is new must not pass for what it has chosen.
"""

from __future__ import annotations

import random
import re
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from evals.setup.config import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from evals.measure.session import Session

CHOICES = 10  # words that an answer is picked from
POOL = 200  # keys, and as many values, that trials draw from
AFTER = 1 / 8  # of a text, behind its last needle
# What is said of a key, the value behind it, and what is asked; the beginning of an answer is what
# is said.
TEMPLATES = (
    ("The secret word of {key} is", "What is the secret word of {key}?"),
    ("The password that opens {key} is", "Which password opens {key}?"),
    ("In the book of codes, the sign for {key} is", "What is the sign for {key} in the book?"),
)
WORD = re.compile(r"\b[a-z]{4,9}\b")


class Question(NamedTuple):
    """What is fed to ask for one needle."""

    depth: float
    tokens: list[int]
    lead: list[int]  # the beginning of the answer
    choices: list[int]  # one token each, the right one first


class Trial(NamedTuple):
    """A text with needles in it, and the questions after it."""

    context: list[int]
    questions: list[Question]


class Haystack:
    """Makes trials of a session's text; equal seeds make equal ones."""

    def __init__(self, session: Session) -> None:
        self.tokenizer, self.text, self.ids = session.tokenizer, session.text, session.ids
        self.seed = session.config.seed

    def trial(self, length: int, depths: Sequence[float], number: int) -> Trial:
        """Return a trial of so many tokens, one question and the beginning of its answer included,
        with a needle at each of the depths, which are asked for in any order.
        """
        draw = random.Random(f"{self.seed} {length} {list(depths)} {number}")
        keys, values = self.words
        keys = draw.sample(keys, len(depths))
        choices = draw.sample(values, max(CHOICES, len(depths)))
        says, asks = draw.choice(TEMPLATES)
        end = self.encode(".\n")
        needles = [
            [*self.encode("\n" + says.format(key=key)), choices[i], *end]
            for i, key in enumerate(keys)
        ]
        asked = []
        for i in draw.sample(range(len(depths)), len(depths)):
            words = [choices[i], *(word for word in choices if word != choices[i])]
            text = "\n" + asks.format(key=keys[i]), " " + says.format(key=keys[i])
            asked.append(Question(depths[i], *map(self.encode, text), words))
        longest = max(len(one.tokens) + len(one.lead) for one in asked)
        room = length - sum(map(len, needles)) - longest
        behind = round(AFTER * length)
        if room <= behind:
            raise ConfigError(
                f"context={length}: accepted are {length - room + behind + 1} and more, "
                f"{len(depths)} needles, a question and the text behind the last take the rest"
            )
        start = draw.randrange(len(self.ids) - room + 1)
        filler = self.ids[start : start + room].tolist()
        for depth, needle in sorted(zip(depths, needles, strict=True), reverse=True):
            at = round(depth * (room - behind))  # deepest first: those before it do not move
            filler[at:at] = needle
        return Trial(filler, asked)

    @cached_property
    def words(self) -> tuple[list[str], list[int]]:
        """Keys, and values as tokens: words of the text, none of them both."""
        found = sorted(set(WORD.findall(self.text)))
        random.Random(self.seed).shuffle(found)
        values = list(self._single(found))
        used = {word for word, _ in values}
        keys = [word for word in found if word not in used][:POOL]
        if len(values) < CHOICES or len(keys) < CHOICES:
            raise ConfigError(
                f"the text has {len(values)} words of one token and {len(keys)} others to make "
                f"needles of, {CHOICES} of each are needed: give another --dataset"
            )
        return keys, [token for _, token in values]

    def _single(self, words: list[str]) -> Iterator[tuple[str, int]]:
        """Yield words that are one token where an answer goes, each with its token."""
        lead, seen = self.encode("is"), set()
        for word in words:
            if len(seen) == min(POOL, len(words) // 2):
                return
            tokens = self.encode(f"is {word}")
            if len(tokens) == len(lead) + 1 and tokens[:-1] == lead and tokens[-1] not in seen:
                seen.add(tokens[-1])
                yield word, tokens[-1]

    def encode(self, text: str) -> list[int]:
        """Return tokens, none of them special."""
        out = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        return out.input_ids[0].tolist()
