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
    return of_texts(session, "retrieval")


def of_texts(session: Session, suite: str, *, in_prompt: bool = True) -> Iterator[Task]:
    """Yield a suite's task per contender and length; without `in_prompt` words are asked for after
    the text alone.
    """
    hay, config = Haystack(session), session.config
    passes = config.trials * (len(DEPTHS) * in_prompt + 1)
    for contender in session.contenders:
        for length in config.context:
            hay.trial(length, DEPTHS, 0)  # refuses a length that is too small, before any work
            yield Task(
                f"{suite}/t{length}/{file_name(contender.name)}",
                f"{contender.name}, length {length:,}",
                contender,
                lambda cell=(contender, length, in_prompt): measure(session, hay, *cell),
                seconds(session, contender, length, in_prompt),
                2 * session.filler.exact_bytes(1, length),
                passes,
                shared=True,
            )


def seconds(session: Session, contender: Contender, length: int, in_prompt: bool = True) -> float:
    """Predict the time of one contender at one length."""
    texts = 1 + len(DEPTHS) * (in_prompt and not waits(contender))
    questions = len(DEPTHS) * (1 + in_prompt)
    return session.config.trials * (
        texts * session.predict.answer(contender, 1, length, 0)
        + questions * session.machine.prefill(ANSWER)
    )


def measure(
    session: Session, hay: Haystack, contender: Contender, length: int, in_prompt: bool = True
) -> Iterator[dict[str, Any]]:
    """Yield what was held, and the share found per depth: `in_prompt`, and after the text."""
    before: list[Answer] = []
    after: list[Answer] = []
    for number in range(session.config.trials):
        trial = hay.trial(length, DEPTHS, number)
        text = begun(session, contender, trial, length)
        if in_prompt:
            for answer in asked(session, contender, trial, length, text):
                before.append(answer)
                session.tick()
        after += answers(session, contender, trial, length, text)
        session.tick()
    place = {"batch": 1, "context": length}
    for metric in ("bytes_held", "tokens_held"):
        held = before or after
        samples = [answer.told[metric] for answer in held]
        yield at(measured(metric, *samples, stats=held[-1].told), **place)
    kinds = {
        "retrieval": [(one, one.listed) for one in after],
        "retrieval_greedy": [(one, one.greedy) for one in after],
    }
    if in_prompt:
        kinds = {"retrieval_asked": [(one, one.listed) for one in before]} | kinds
    for metric, all_of_it in kinds.items():
        for depth in DEPTHS:
            hits = [float(hit) for one, hit in all_of_it if one.depth == depth]
            told = all_of_it[-1][0].told
            row = measured(metric, *hits, value=mean(hits), note=NOTES[metric], stats=told)
            yield at(row, **place, case={"length": length, "depth": depth, "keys": len(DEPTHS)})


def begun(session: Session, contender: Contender, trial: Trial, length: int) -> Cache | None:
    """Return what has read a text but for its last token, for all questions, of who leaves it as it
    is until the end of the prompt has come; None of others, which read every prompt.
    """
    if not waits(contender):
        return None
    text = contender.build(session.model.config, length)
    prompt(session, text, trial.context[:-1], len(trial.context))
    return text


def asked(
    session: Session, contender: Contender, trial: Trial, length: int, text: Cache | None = None
) -> Iterator[Answer]:
    """Yield what comes of each question at the end of a prompt of its own; text: `begun`."""
    for question in trial.questions:
        whole = trial.context + question.tokens
        asks = [(question, question.lead)]
        yield from answered(session, contender, whole, asks, length, text)


def answers(
    session: Session, contender: Contender, trial: Trial, length: int, text: Cache | None = None
) -> Iterator[Answer]:
    """Yield what comes of each question after the text, each to the same cache; text: `begun`."""
    asks = [(question, question.tokens + question.lead) for question in trial.questions]
    yield from answered(session, contender, trial.context, asks, length, text)


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
    read: Cache | None = None,
) -> Iterator[Answer]:
    """Yield what comes of each question, with the tokens that are fed behind a text to ask it.

    read: what has read the text so far that it has, to be copied
    """
    if isinstance(contender, Outside):
        behind = [{"more": tokens, "choices": one.choices} for one, tokens in asks]
        told = contender.answers(session.model, text, behind)
        for (question, _), found in zip(asks, told.pop("answers"), strict=True):
            yield Answer(question.depth, found["listed"], found["greedy"], told)
        return

    def reading() -> Cache:
        cache = copy.deepcopy(read)
        if cache is None:
            cache = contender.build(session.model.config, length)
        prompt(session, cache, text[cache.get_seq_length() :], len(text))
        return cache

    cache = reading()
    told = account(cache)
    for question, tokens in asks:
        try:
            twin = copy.deepcopy(cache)
        except RuntimeError:  # so say tensors of optimum-quanto, in transformers' own cache
            twin = reading()
        logits = feed(session, twin, tokens)
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


def tables(config: dict[str, Any], rows: list[Row], *, in_prompt: bool = True) -> list[Table]:
    """Return a table per length."""
    made = [
        by_strategy(f"{length:,} tokens", pooled([r for r in rows if r["context"] == length]))
        for length in sorted({row["context"] for row in rows})
    ]
    if made:
        made[-1] = made[-1]._replace(notes=[method(config, in_prompt)])
    return made


def method(config: dict[str, Any], in_prompt: bool = True) -> str:
    """Return how words were asked for."""
    held = "a prompt with its question" if in_prompt else "the text"
    return (
        f"Words: {config['trials']} texts of {len(TEMPLATES)} templates, {len(DEPTHS)} words "
        f"hidden in each, none in its last eighth; {NOTES['retrieval']}; 95 % interval (Wilson). "
        f"Held, and tokens a head: of {held}. Words found: each question comes "
        "to what is held of the text without it."
    )
