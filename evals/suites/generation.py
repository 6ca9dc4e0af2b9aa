"""How far greedy continuations stray from the exact cache's: tokens, edits, words."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import evaluate

from evals import greedy
from evals.schema import at, measured
from evals.strategies import file_name
from evals.tables import by_strategy
from evals.task import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from evals.bench import Bench
    from evals.schema import Row
    from evals.strategies import Strategy
    from evals.tables import Table

DEFAULTS: dict[str, Any] = {"context": (512,), "batch": (8,), "new_tokens": 64}
NEEDS = {"model", "text"}
METRICS = Path(__file__).parents[1] / "metrics"
WORDS = "exact_match", "rouge"  # `evaluate` metrics; each names its figures itself


def tasks(bench: Bench) -> Iterator[Task]:
    """Yield a task per batch, context and strategy."""
    steps = bench.config.new_tokens

    @cache
    def exact(batch: int, context: int) -> torch.Tensor:
        prompt = bench.prompt(batch, context)
        return greedy.tokens(bench.model, bench.strategies[0], prompt, steps)

    for batch in bench.config.batch:
        for context in bench.config.context:
            for strategy in bench.strategies:
                yield Task(
                    f"generation/b{batch}/t{context}/{file_name(strategy.name)}",
                    f"{strategy.name}, batch {batch}, context {context:,}",
                    strategy,
                    lambda cell=(strategy, batch, context): measure(bench, exact, *cell),
                    bench.answer_seconds(strategy, batch, context, steps),
                    2 * bench.filler.exact_bytes(batch, context + steps),
                    shared=True,
                )


def measure(
    bench: Bench,
    exact: Callable[[int, int], torch.Tensor],
    strategy: Strategy,
    batch: int,
    context: int,
) -> Iterator[dict[str, Any]]:
    """Yield what continuations of `batch` prompts have in common with the exact cache's."""
    prompt = bench.prompt(batch, context)
    ours = greedy.tokens(bench.model, strategy, prompt, bench.config.new_tokens)
    theirs = exact(batch, context)
    texts, references = (bench.tokenizer.batch_decode(ids) for ids in (ours, theirs))
    bench.save(
        "generation",
        f"b{batch}-t{context}-{file_name(strategy.name)}",
        strategy=strategy.name,
        continuations=texts,
    )
    edits = [distance(a, b) / len(b) for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)]
    place = {"batch": batch, "context": context}
    yield at(greedy.agreement(ours, theirs), **place)
    yield at(measured("edit_distance", *edits), **place)
    for name in WORDS:
        metric = evaluate.load(str(METRICS / name), keep_in_memory=True)
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
