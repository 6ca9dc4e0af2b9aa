"""Words hidden in a text, and the questions that ask for them.

The text is the dataset's own, and so are the words. A needle says that the secret word of a key is
a value; values are one token each, so that one forward gives the likelihood of every word that the
answer could be, and no cache must be copied to try them.
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
SAYS = "The secret word of {key} is"
NEEDLE = "\n" + SAYS
QUESTION = "\nWhat is the secret word of {key}? " + SAYS
WORD = re.compile(r"\b[a-z]{4,9}\b")


class Question(NamedTuple):
    """What is fed to ask for one needle; the answer is fed with the next question."""

    depth: float
    tokens: list[int]
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
        """Return a trial of so many tokens, answers aside, with a needle at each of the depths,
        which are asked for in any order.
        """
        draw = random.Random(f"{self.seed} {length} {list(depths)} {number}")
        keys, values = self.words
        keys = draw.sample(keys, len(depths))
        choices = draw.sample(values, max(CHOICES, len(depths)))
        end = self.encode(".\n")
        needles = [
            [*self.encode(NEEDLE.format(key=key)), choices[i], *end] for i, key in enumerate(keys)
        ]
        asked = []
        for i in draw.sample(range(len(depths)), len(depths)):
            words = [choices[i], *(word for word in choices if word != choices[i])]
            asked.append(Question(depths[i], self.encode(QUESTION.format(key=keys[i])), words))
        room = length - sum(map(len, needles)) - sum(len(one.tokens) + 1 for one in asked)
        if room < 1:
            raise ConfigError(
                f"context={length}: accepted are {length - room + 1} and more, {len(depths)} "
                "needles and the questions about them take the rest"
            )
        start = draw.randrange(len(self.ids) - room + 1)
        filler = self.ids[start : start + room].tolist()
        for depth, needle in sorted(zip(depths, needles, strict=True), reverse=True):
            at = round(depth * room)  # deepest first: those before it do not move
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
