"""What a cache is for: an answer with `use_cache=False`, every token recomputed, against a cache.

Greedy, after a short prompt, one forward per token. The context of a row is the length of the
answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from evals.measure.clock import step
from evals.measure.interleave import interleave, pooled
from evals.rows.noise import Noise
from evals.rows.schema import at, failed, measured
from evals.rows.tables import Table, figure, grid
from evals.rows.task import Task
from evals.setup.contenders import EXACT, Contender
from evals.setup.control import Same

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from evals.measure.interleave import Rounds
    from evals.measure.session import Session
    from evals.rows.schema import Row

DEFAULTS: dict[str, Any] = {
    "strategies": (EXACT, "growing", "int4"),
    "context": (32, 64, 128, 256),
    "repeats": 2,
}
NEEDS = {"model", "text"}
PROMPT = 8  # tokens before the answer


@dataclass(frozen=True)
class Recompute(Contender):
    """No cache: every token is computed again for every new one."""

    name: str = "control:recompute"

    @property
    def spec(self) -> str:
        """What is called."""
        return "a forward over all tokens for each new one, use_cache=False"


def tasks(session: Session) -> Iterator[Task]:
    """Yield one task: the exponent needs all lengths."""
    contenders = [*session.contenders, Recompute(), Same()]
    lengths, repeats = sorted(session.config.context), session.config.repeats
    yield Task(
        "use_cache",
        "no cache against a cache",
        session.contenders[0],
        lambda: measure(session, contenders, lengths),
        repeats * sum(seconds(session, s, length) for s in contenders for length in lengths),
        steps=repeats * len(contenders) * len(lengths),
    )


def seconds(session: Session, contender: Contender, length: int) -> float:
    """Predict an answer of one contender."""
    if not isinstance(contender, Recompute):
        return length * session.predict.step(contender, 1, length // 2)
    machine = session.machine
    return sum(machine.step(1) + machine.prefill(PROMPT + i) for i in range(length))


def measure(
    session: Session, contenders: list[Contender], lengths: list[int]
) -> Iterator[dict[str, Any]]:
    """Yield times and gains per length, then the exponents."""
    found: dict[Contender, dict[int, list[float]]] = {contender: {} for contender in contenders}
    for length in lengths:
        place = {"batch": 1, "context": length}
        runners = {contender: answering(session, contender, length) for contender in found}
        rounds = interleave(runners, session.config.repeats, session.tick)
        for contender, own in rounds.items():
            if isinstance(own, Exception):
                yield at(failed(own), contender, **place)
                del found[contender]
                continue
            found[contender][length] = pooled(own)
            yield at(measured("generate", *pooled(own)), contender, **place)
            if row := gain(own, rounds[contenders[-2]]):
                yield at(row, contender, **place)
    note = f"fitted over lengths {', '.join(map(str, lengths))}"
    for contender, times in found.items():
        if len(times) > 1:
            slopes = [exponent(lengths, own) for own in zip(*times.values(), strict=True)]
            row = measured("exponent", *slopes, note=note)
            yield at(row, contender, batch=1, context=lengths[-1])


def answering(session: Session, contender: Contender, length: int) -> Callable[[], list[float]]:
    """Return what times one answer, a new cache each."""
    prompt = session.prompt(1, PROMPT)

    def cached() -> list[float]:
        cache = contender.build(session.model.config, PROMPT + length)
        token, took = step(session.model, cache, prompt)
        for _ in range(length - 1):
            token, more = step(session.model, cache, token)
            took += more
        return [took]

    def recomputed() -> list[float]:
        ids, took = prompt, 0.0
        for _ in range(length):
            token, more = step(session.model, None, ids)
            ids, took = torch.cat([ids, token], 1), took + more
        return [took]

    return recomputed if isinstance(contender, Recompute) else cached


def gain(own: list[list[float]], without: Rounds) -> dict[str, Any] | None:
    """Return the row that says how many times as fast as without a cache."""
    if isinstance(without, Exception):
        return None
    ratios = [r[0] / o[0] for o, r in zip(own, without, strict=True)]
    return measured("cache_gain", *ratios, note="one sample per round")


def exponent(lengths: list[int], times: tuple[float, ...]) -> float:
    """Return the slope of log time over log length, by least squares.

    >>> round(exponent([1, 2, 4], (3.0, 12.0, 48.0)), 6)
    2.0
    """
    return float(np.polyfit(np.log(lengths), np.log(times), 1)[0])


def tables(config: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Return times with gains over lengths, and the exponents."""
    off = Noise(rows)
    timed = [row for row in rows if row["metric"] == "generate"]
    exact = {row["context"]: row["value"] for row in timed if row["strategy"] == EXACT}

    def cell(found: dict[str, Row]) -> str:
        text, row = figure(found, "generate", ".2f"), found.get("generate")
        if "cache_gain" in found:
            text += f" ({figure(found, 'cache_gain', '.1f')}x)"
        if row and row["context"] in exact:
            text += off.flag(row, exact[row["context"]] / row["value"])
        return text

    title = "seconds of an answer ↓ (times as fast as without a cache ↑), by its tokens"
    times = grid(title, [row for row in rows if row["metric"] != "exponent"], cell)
    body = [
        [row["strategy"], f"{row['value']:.2f}", f"{row['p20']:.2f}-{row['p80']:.2f}"]
        for row in rows
        if row["metric"] == "exponent"
    ]
    slopes = Table("exponent of time over length ↓", ["strategy", "exponent", "p20-p80"], body, [])
    said = [
        f"Greedy after {PROMPT} tokens, median of {config['repeats']} rounds.",
        *off.lines(),
    ]
    return [times, slopes._replace(notes=said)]
