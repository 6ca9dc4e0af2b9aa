"""How far greedy continuations stray from the exact cache's: tokens, edits, words."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from evals import metrics
from evals.measure import greedy
from evals.rows.schema import at, measured
from evals.rows.tables import by_strategy
from evals.rows.task import Task
from evals.setup.contenders import file_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from evals.measure.session import Session
    from evals.rows.schema import Row
    from evals.rows.tables import Table
    from evals.setup.contenders import Contender

DEFAULTS: dict[str, Any] = {"context": (512,), "batch": (8,), "new_tokens": 64}
NEEDS = {"model", "text"}
WORDS = "exact_match", "rouge"  # `evaluate` metrics; each names its figures itself


def tasks(session: Session) -> Iterator[Task]:
    """Yield a task per batch, context and contender."""
    steps = session.config.new_tokens

    @cache
    def exact(batch: int, context: int) -> torch.Tensor:
        prompt = session.prompt(batch, context)
        return greedy.continuation(session.model, session.contenders[0], prompt, steps)

    for batch in session.config.batch:
        for context in session.config.context:
            for contender in session.contenders:
                yield Task(
                    f"generation/b{batch}/t{context}/{file_name(contender.name)}",
                    f"{contender.name}, batch {batch}, context {context:,}",
                    contender,
                    lambda cell=(contender, batch, context): measure(session, exact, *cell),
                    session.predict.answer(contender, batch, context, steps),
                    2 * session.filler.exact_bytes(batch, context + steps),
                    shared=True,
                )


def measure(
    session: Session,
    exact: Callable[[int, int], torch.Tensor],
    contender: Contender,
    batch: int,
    context: int,
) -> Iterator[dict[str, Any]]:
    """Yield what continuations of `batch` prompts have in common with the exact cache's."""
    prompt = session.prompt(batch, context)
    ours = greedy.continuation(session.model, contender, prompt, session.config.new_tokens)
    theirs = exact(batch, context)
    texts, references = (session.tokenizer.batch_decode(ids) for ids in (ours, theirs))
    session.save(
        "generation",
        f"b{batch}-t{context}-{file_name(contender.name)}",
        strategy=contender.name,
        continuations=texts,
    )
    edits = [distance(a, b) / len(b) for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)]
    place = {"batch": batch, "context": context}
    yield at(greedy.agreement(ours, theirs), **place)
    yield at(measured("edit_distance", *edits), **place)
    for name in WORDS:
        metric = metrics.load(name)
        whole = metric.compute(predictions=texts, references=references)
        pairs = zip(texts, references, strict=True)
        each = [metric.compute(predictions=[a], references=[b]) for a, b in pairs]
        for figure, value in whole.items():
            row = measured(figure, *(one[figure] for one in each), value=float(value))
            yield at(row, **place)


def distance(ours: list[int], theirs: list[int]) -> int:
    """Return the fewest insertions, deletions and replacements that make one the other.

    >>> distance([1, 2, 3, 4], [1, 3, 4, 5])
    2
    """
    row = list(range(len(theirs) + 1))
    for i, a in enumerate(ours, 1):
        corner, row[0] = row[0], i
        for j, b in enumerate(theirs, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (a != b))
    return row[-1]


def tables(config: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Return a table per batch and context."""
    made = [
        by_strategy(
            f"{batch} continuations of {context:,} tokens",
            [row for row in rows if (row["batch"], row["context"]) == (batch, context)],
        )
        for batch, context in dict.fromkeys((row["batch"], row["context"]) for row in rows)
    ]
    if made:
        said = (
            f"Greedy, {config['new_tokens']} tokens by `generate`, against the exact cache's; edit "
            "distance in tokens, the rest on the texts."
        )
        made[-1] = made[-1]._replace(notes=[said])
    return made
