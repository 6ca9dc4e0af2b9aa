"""Whether words hidden in a long text are found: by depth, length and number of keys.

A text of the dataset's own goes through the cache in chunks, as in `drift`; the questions come last
and can only be answered from what the cache gives back. One key: a needle at one depth. Several: a
needle at every depth, asked for one after another in the same cache.
"""

from __future__ import annotations

from statistics import mean
from typing import TYPE_CHECKING, Any

import torch

from evals.measure.needles import CHOICES, Haystack
from evals.rows.schema import at, measured
from evals.rows.tables import Table
from evals.rows.task import Task
from evals.setup.contenders import file_name
from kvplug.compat import cache_argument

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import Cache

    from evals.measure.needles import Trial
    from evals.measure.session import Session
    from evals.rows.schema import Row
    from evals.setup.contenders import Contender

DEPTHS = 0.0, 0.25, 0.5, 0.75, 1.0  # 0 is the beginning of the text, 1 its end
DEFAULTS: dict[str, Any] = {
    "strategies": ("transformers:dynamic", "int8", "int4", "window(length=1024)", "int2"),
    "context": (512, 1024, 2048),
}
NEEDS = {"model", "text"}
NOTES = {
    "retrieval": f"most likely of {CHOICES} words, all of one token; by chance {1 / CHOICES:g}",
    "retrieval_greedy": "the most likely token of all",
}


def tasks(session: Session) -> Iterator[Task]:
    """Yield a task per contender, exact one first, and length."""
    hay, config = Haystack(session), session.config
    passes = config.trials * len(layouts())
    for contender in session.contenders:
        for length in config.context:
            hay.trial(length, DEPTHS, 0)  # refuses a length that is too small, before any work
            yield Task(
                f"retrieval/t{length}/{file_name(contender.name)}",
                f"{contender.name}, length {length:,}",
                contender,
                lambda cell=(contender, length): measure(session, hay, *cell),
                passes * session.predict.chunks(contender, length),
                2 * session.filler.exact_bytes(1, length),
                passes,
                shared=True,
            )


def layouts() -> list[tuple[float, ...]]:
    """Return the depths of the needles of each text: one alone, and all together."""
    return [*((depth,) for depth in DEPTHS), DEPTHS]


def measure(
    session: Session, hay: Haystack, contender: Contender, length: int
) -> Iterator[dict[str, Any]]:
    """Yield the share found, and the share said, per number of keys and depth."""
    found: dict[tuple[int, float], list[tuple[bool, bool]]] = {}
    for depths in layouts():
        for number in range(session.config.trials):
            trial = hay.trial(length, depths, number)
            for depth, answer in answers(session, contender, trial, length):
                found.setdefault((len(depths), depth), []).append(answer)
            session.tick()
    for (keys, depth), answered in sorted(found.items()):
        case = {"length": length, "depth": depth, "keys": keys}
        for metric, hits in zip(NOTES, zip(*answered, strict=True), strict=True):
            row = measured(metric, *map(float, hits), value=mean(hits), note=NOTES[metric])
            yield at(row, batch=1, context=length, case=case)


def answers(
    session: Session, contender: Contender, trial: Trial, length: int
) -> Iterator[tuple[float, tuple[bool, bool]]]:
    """Yield a depth and whether its word is the likeliest of the choices, and of all."""
    cache = contender.build(session.model.config, length)
    feed(session, cache, trial.context)
    before: list[int] = []  # the right answer to the last question, as if the model had given it
    for question in trial.questions:
        logits = feed(session, cache, before + question.tokens)
        right, *wrong = question.choices
        listed = logits[right] > logits[wrong].max()  # a tie, or no number at all, is a miss
        yield question.depth, (bool(listed), int(logits.argmax()) == right)
        before = [right]


@torch.no_grad()
def feed(session: Session, cache: Cache, tokens: list[int]) -> torch.Tensor:
    """Feed tokens in chunks; return the last one's logits [V]."""
    ids = torch.tensor([tokens], device=session.model.device)
    for chunk in ids.split(session.config.chunk, dim=1):
        out = session.model(
            input_ids=chunk, **cache_argument(cache), use_cache=True, logits_to_keep=1
        )
    return out.logits[0, -1].float()


def tables(config: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Return a table per number of keys: contenders over lengths, mean over depths."""
    shares: dict[int, dict[str, dict[int, list[Row]]]] = {}
    failed = dict.fromkeys(row["strategy"] for row in rows if row["status"] == "failed")
    for row in rows:
        if row["metric"] == "retrieval":
            own = shares.setdefault(row["case"]["keys"], {}).setdefault(row["strategy"], {})
            own.setdefault(row["context"], []).append(row)
    made = []
    for keys, names in sorted(shares.items()):
        lengths = sorted({length for own in names.values() for length in own})
        body = [
            [name, *(by_depth(own[length]) if length in own else "-" for length in lengths)]
            for name, own in names.items()
        ]
        body += [[name, *["failed"] * len(lengths)] for name in failed if name not in names]
        title = f"share of words found ↑, {keys} key{'s' * (keys > 1)}"
        made.append(Table(title, ["strategy", *(f"{x:,}" for x in lengths)], body, []))
    if made:
        depths = ", ".join(f"{depth:g}" for depth in DEPTHS)
        said = (
            f"Mean over depths, and at depths {depths}; {config['trials']} trials each; "
            f"{NOTES['retrieval']}. Text fed {config['chunk']} tokens at a time."
        )
        made[-1] = made[-1]._replace(notes=[said])
    return made


def by_depth(rows: list[Row]) -> str:
    """Return the mean share, and that of each depth."""
    ordered = [row["value"] for row in sorted(rows, key=lambda row: row["case"]["depth"])]
    return f"{mean(ordered):.2f} ({' '.join(f'{x:.1f}' for x in ordered)})"
