"""Whether words hidden in a long text are found, asked for in the prompt and only after it.

Each text has a needle at every depth, and each is asked for. **Asked in the prompt**: the text and
the question are one prompt, as in `generate`, and what retention drops goes when it has been read.
**After it**: the text alone is that prompt, and each question comes to a copy of what the cache
holds by then, so that no answer helps with the next. Either way the beginning of the answer is fed
behind, and what it ends with can only be known from what the cache gives back.
"""

from __future__ import annotations

import copy
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import kvplug
from evals.measure.memory import account
from evals.measure.needles import CHOICES, TEMPLATES, Haystack
from evals.rows.schema import at, measured
from evals.rows.tables import by_strategy
from evals.rows.task import Task
from evals.setup.contenders import EXACT, Outside, file_name
from kvplug.compat import cache_argument
from kvplug.retention.base import Scored

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import Cache

    from evals.measure.needles import Question, Trial
    from evals.measure.session import Session
    from evals.rows.schema import Row
    from evals.rows.tables import Table
    from evals.setup.contenders import Contender

DEPTHS = 0.0, 0.25, 0.5, 0.75, 1.0  # 0 is the beginning of the text, 1 where its last eighth begins
DEFAULTS: dict[str, Any] = {
    "strategies": (
        "transformers:dynamic",
        "int4",
        "snapkv(budget=256)",
        "snapkv(budget=128)+int4",
        "expected(budget=256)",
        "sinks(sinks=4, window=256)",
    ),
    "context": (1024, 2048),
}
NEEDS = {"model", "text"}
NOTES = {
    "retrieval_asked": f"most likely of {CHOICES} words, all of one token; by chance {1 / CHOICES}",
    "retrieval": f"most likely of {CHOICES} words, all of one token; by chance {1 / CHOICES}",
    "retrieval_greedy": "the most likely token of all",
}
ANSWER = 32  # tokens of a question and an answer, about: for predictions of time


class Answer(NamedTuple):
    """What came of one question."""

    depth: float
    listed: bool  # whether the right word is the likeliest of the choices
    greedy: bool  # and of all tokens
    told: dict[str, Any]  # what the cache held and said when the prompt had been read


def tasks(session: Session) -> Iterator[Task]:
    """Yield a task per contender, exact one first, and length."""
    hay, config = Haystack(session), session.config
    passes = config.trials * (len(DEPTHS) + 1)
    for contender in session.contenders:
        for length in config.context:
            hay.trial(length, DEPTHS, 0)  # refuses a length that is too small, before any work
            yield Task(
                f"retrieval/t{length}/{file_name(contender.name)}",
                f"{contender.name}, length {length:,}",
                contender,
                lambda cell=(contender, length): measure(session, hay, *cell),
                seconds(session, contender, length),
                2 * session.filler.exact_bytes(1, length),
                passes,
                shared=True,
            )


def seconds(session: Session, contender: Contender, length: int) -> float:
    """Predict the time of one contender at one length."""
    texts = session.config.trials * ((1 if waits(contender) else len(DEPTHS)) + 1)
    return texts * (
        session.predict.answer(contender, 1, length, 0) + session.machine.prefill(ANSWER)
    )


def measure(
    session: Session, hay: Haystack, contender: Contender, length: int
) -> Iterator[dict[str, Any]]:
    """Yield what was held, and the share found per depth, asked in the prompt and after it."""
    before: list[Answer] = []
    after: list[Answer] = []
    for number in range(session.config.trials):
        trial = hay.trial(length, DEPTHS, number)
        for answer in asked(session, contender, trial, length):
            before.append(answer)
            session.tick()
        after += answers(session, contender, trial, length)
        session.tick()
    place = {"batch": 1, "context": length}
    for metric in ("bytes_held", "tokens_held"):
        samples = [answer.told[metric] for answer in before]
        yield at(measured(metric, *samples, stats=before[-1].told), **place)
    kinds = {
        "retrieval_asked": [(one, one.listed) for one in before],
        "retrieval": [(one, one.listed) for one in after],
        "retrieval_greedy": [(one, one.greedy) for one in after],
    }
    for metric, all_of_it in kinds.items():
        for depth in DEPTHS:
            hits = [float(hit) for one, hit in all_of_it if one.depth == depth]
            told = all_of_it[-1][0].told
            row = measured(metric, *hits, value=mean(hits), note=NOTES[metric], stats=told)
            yield at(row, **place, case={"length": length, "depth": depth, "keys": len(DEPTHS)})


def asked(session: Session, contender: Contender, trial: Trial, length: int) -> Iterator[Answer]:
    """Yield what comes of each question at the end of a prompt of its own.

    Who leaves a text as it is until the question has come reads it once for all of them.
    """
    text = None
    if waits(contender):
        text = contender.build(session.model.config, length)
        prompt(session, text, trial.context, len(trial.context) + 1)
    for question in trial.questions:
        whole = trial.context + question.tokens
        asks = [(question, question.lead)]
        yield from answered(session, contender, whole, asks, length, text)


def answers(session: Session, contender: Contender, trial: Trial, length: int) -> Iterator[Answer]:
    """Yield what comes of each question after the text, each to the same cache."""
    asks = [(question, question.tokens + question.lead) for question in trial.questions]
    yield from answered(session, contender, trial.context, asks, length)


def waits(contender: Contender) -> bool:
    """Whether a cache leaves a prompt as it is until the end of it has come."""
    if ":" in contender.name:
        return contender.name == EXACT
    retention = kvplug.parse(contender.name).retention
    return isinstance(retention, Scored) and retention.for_question


def answered(
    session: Session,
    contender: Contender,
    text: list[int],
    asks: list[tuple[Question, list[int]]],
    length: int,
    begun: Cache | None = None,
) -> Iterator[Answer]:
    """Yield what comes of each question, with the tokens that are fed behind a text to ask it.

    begun: what has read the text so far that it has, to be copied
    """
    if isinstance(contender, Outside):
        behind = [{"more": tokens, "choices": one.choices} for one, tokens in asks]
        told = contender.answers(session.model, text, behind)
        for (question, _), found in zip(asks, told.pop("answers"), strict=True):
            yield Answer(question.depth, found["listed"], found["greedy"], told)
        return
    cache = copy.deepcopy(begun)
    if cache is None:
        cache = contender.build(session.model.config, length)
    prompt(session, cache, text[cache.get_seq_length() :], len(text))
    told = account(cache)
    for question, tokens in asks:
        logits = feed(session, copy.deepcopy(cache), tokens)
        right, *wrong = question.choices
        listed = bool(logits[right] > logits[wrong].max())  # a tie, or no number, is a miss
        yield Answer(question.depth, listed, int(logits.argmax()) == right, told)


def prompt(session: Session, cache: Cache, tokens: list[int], length: int) -> None:
    """Have a cache take in a prompt of so many tokens, or the next ones of it, as `generate`
    does.
    """
    if hasattr(cache, "expect"):
        cache.expect(length)
    feed(session, cache, tokens)


@torch.no_grad()
def feed(session: Session, cache: Cache, tokens: list[int]) -> torch.Tensor:
    """Feed tokens in one forward; return the last one's logits [V]."""
    ids = torch.tensor([tokens], device=session.model.device)
    out = session.model(input_ids=ids, **cache_argument(cache), use_cache=True, logits_to_keep=1)
    return out.logits[0, -1].float()


def pooled(rows: list[Row]) -> list[Row]:
    """Return rows with those of all depths in one, of each metric, strategy and context."""
    whole = [row for row in rows if not isinstance(row["case"], dict)]
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if isinstance(row["case"], dict):
            place = row["strategy"], row["metric"], row["context"]
            groups.setdefault(place, []).append(row)
    for group in groups.values():
        n = sum(row["n"] for row in group)
        value = sum(row["value"] * row["n"] for row in group) / n
        whole.append(group[0] | {"value": value, "n": n, "case": None})
    return whole


def tables(config: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Return a table per length."""
    made = [
        by_strategy(f"{length:,} tokens", pooled([r for r in rows if r["context"] == length]))
        for length in sorted({row["context"] for row in rows})
    ]
    if made:
        made[-1] = made[-1]._replace(notes=[method(config)])
    return made


def method(config: dict[str, Any]) -> str:
    """Return how words were asked for."""
    return (
        f"Words: {config['trials']} texts of {len(TEMPLATES)} templates, {len(DEPTHS)} words "
        f"hidden in each, none in its last eighth; {NOTES['retrieval']}; 95 % interval (Wilson). "
        "Held, and tokens a head: of a prompt with its question. Words found: each question comes "
        "to what is held of the text without it."
    )
