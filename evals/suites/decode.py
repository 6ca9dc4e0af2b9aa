"""Milliseconds per decoded token over contexts and batches, against what the memory allows.

All strategies of a context and batch run in one loop, in alternating order, each round with a new
cache filled with random numbers. The floor is predicted before measuring: the step that has no
context, plus the stored bytes of keys and values over the machine's bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from evals.clock import step
from evals.config import STRATEGIES
from evals.control import Same
from evals.memory import checked_bytes, free_bytes
from evals.noise import SAME, Noise
from evals.race import pooled, race, speedup
from evals.schema import at, failed, measured
from evals.strategies import EXACT
from evals.tables import Table, figure, grid, notes, timing
from evals.task import Task

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evals.bench import Bench
    from evals.schema import Row
    from evals.strategies import Strategy

DEFAULTS: dict[str, Any] = {
    "strategies": (*STRATEGIES, "transformers:fp8"),
    "context": (512, 1024, 2048, 4096, 6000, 8000),
    "batch": (1, 4, 8),
    "decode_steps": 12,
}
NEEDS = {"model"}
SPARE = 0.9  # of the free memory that a cache may take
MUCH = 1.3  # times as long: worth a line


def tasks(bench: Bench) -> Iterator[Task]:
    """Yield a task per batch and context, all strategies in it; and the steps without context."""
    config, exact = bench.config, bench.strategies[0]
    steps = config.warmup + config.decode_steps
    yield Task("decode/empty", "no context", exact, lambda: empty(bench), 1.0)
    field = [*bench.strategies, Same()]
    for batch, context, note in bench.cells():
        round_s = sum(
            bench.pace.fill(s, batch, context) + steps * bench.pace.step(s, batch, context)
            for s in field
        )
        size = bench.filler.exact_bytes(batch, context)
        yield Task(
            f"decode/b{batch}/t{context}",
            f"batch {batch}, context {context:,}",
            exact,
            lambda cell=(batch, context, note): measure(bench, field, *cell),
            config.repeats * round_s,
            2 * size,
            config.repeats * len(field),
        )


def empty(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield the exact cache's step at next to no context, per batch."""
    for batch in bench.config.batch:
        seconds = bench.machine.step(batch)
        yield at(measured("decode", 1000 * seconds), batch=batch, context=0)


def measure(
    bench: Bench, field: list[Strategy], batch: int, context: int, note: str | None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one batch and context."""
    place = {"batch": batch, "context": context}
    runners = {}
    for strategy in field:
        try:
            if reason := no_room(bench, strategy, batch, context):
                yield at(measured("decode", note=reason), strategy, **place)
            else:
                runners[strategy] = Runner(bench, strategy, batch, context)
        except Exception as error:  # it cannot be built: its row says so
            yield at(failed(error), strategy, **place)
    laps = race(runners, bench.config.repeats, bench.tick)
    reference = laps.get(bench.strategies[0], ValueError())
    how = "; ".join(text for text in (bench.filler.note, note) if text)
    for strategy, runner in runners.items():
        if isinstance(laps[strategy], Exception):
            yield at(failed(laps[strategy]), strategy, **place)
            continue
        for row in runner.rows(laps[strategy], reference, how):
            yield at(row, strategy, **place)


@dataclass
class Runner:
    """One strategy in the loop: each call is a round with a cache of its own."""

    bench: Bench
    strategy: Strategy
    batch: int
    context: int
    held: int | None = None
    stats: dict[str, Any] | None = None
    energy: list[float] = field(default_factory=list)  # joules per token, of each round

    def __call__(self) -> list[float]:
        """Return milliseconds of each timed step."""
        model, config = self.bench.model, self.bench.config
        steps = config.warmup + config.decode_steps
        cache = self.strategy.build(model.config, self.context + steps)
        self.bench.filler.fill(cache, self.batch, self.context)
        token = torch.ones(self.batch, 1, dtype=torch.long, device=model.device)
        times = []
        meter = self.bench.meter or (lambda: 0.0)
        for number in range(steps):
            if number == config.warmup:
                before = meter()
            token, seconds = step(model, cache, token)
            times.append(1000 * seconds)
        if self.bench.meter:
            self.energy.append((meter() - before) / (config.decode_steps * self.batch))
        self.held = self.held or checked_bytes(cache)  # room that growth reserves included
        self.stats = cache.stats() if hasattr(cache, "stats") else None
        return times[config.warmup :]

    def rows(
        self, laps: list[list[float]], reference: list[list[float]] | Exception, note: str
    ) -> Iterator[dict[str, Any]]:
        """Yield what the rounds say."""
        times = pooled(laps)
        low = 1000 * floor(self.bench, self.strategy, self.batch, self.context)
        yield measured("decode", *times, note=note, stats=self.stats)
        if len(laps) > 1:
            yield measured("decode_new", *laps[0])
        yield measured("throughput", *(1000 * self.batch / x for x in times))
        if ratio := speedup(laps, reference):
            yield ratio
        if self.energy:
            yield measured("energy", *self.energy)
        yield measured("floor", low)
        yield measured("floor_share", *(100 * low / x for x in times))
        yield measured("bytes_held", self.held)


def floor(bench: Bench, strategy: Strategy, batch: int, context: int) -> float:
    """Predict the seconds that a step cannot do without."""
    return (
        bench.machine.step(batch)
        + batch * stored(bench, strategy, context) / bench.machine.bandwidth
    )


def stored(bench: Bench, strategy: Strategy, context: int) -> int:
    """Return the bytes per row that attention must read: reserved room beyond the tokens is not."""
    return min(
        bench.filler.stored_bytes(strategy, context),
        bench.filler.exact_bytes(1, context) or 1 << 62,
    )


def no_room(bench: Bench, strategy: Strategy, batch: int, context: int) -> str | None:
    """Return why a cache does not fit in memory, or None."""
    filler = bench.filler
    # as it comes, and one layer of it in full precision a few times over
    need = batch * filler.stored_bytes(strategy, context)
    need += 4 * filler.exact_bytes(batch, context) // max(1, len(filler.like or ()))
    room = free_bytes(bench.device)
    if need <= SPARE * room:
        return None
    return f"does not fit: needs {need / 1e9:.2f} GB, {room / 1e9:.2f} GB are free"


def forecast(bench: Bench) -> list[Table]:
    """Return the floors, predicted."""
    machine, cells = bench.machine, list(bench.cells())
    told = []
    for batch in bench.config.batch:
        contexts = [context for b, context, _ in cells if b == batch]
        body = []
        for strategy in bench.strategies:
            try:
                floors = [1000 * floor(bench, strategy, batch, context) for context in contexts]
                body.append([strategy.name, *(f"{x:.1f}" for x in floors)])
            except Exception as error:  # measuring it will say the same, in its row
                body.append([strategy.name, f"{type(error).__name__}: {error}"[:60]])
        title = f"predicted floor, ms/token ↓, batch {batch}"
        notes = [
            f"Step without context {1000 * machine.step(batch):.1f} ms (its "
            f"{machine.weight_bytes / 1e6:.0f} MB of weights alone "
            f"{1000 * machine.weight_bytes / machine.bandwidth:.1f} ms), plus stored K/V bytes at "
            f"{machine.bandwidth / 1e9:.1f} GB/s."
        ]
        told.append(Table(title, ["strategy", *(f"{x:,}" for x in contexts)], body, notes))
    return told


def tables(config: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Return two tables per batch: times, and the share of the floor reached."""
    off, made = Noise(rows), []
    for batch in config["batch"]:
        mine = [row for row in rows if row["batch"] == batch]
        times = grid(
            f"decode, ms/token ↓ (times as fast as {EXACT} ↑), batch {batch}",
            mine,
            timing("decode", ".1f", off),
        )
        share = grid(
            f"share of the predicted floor, % ↑, batch {batch}",
            [row for row in mine if row["context"] and row["strategy"] != SAME],
            lambda found: figure(found, "floor_share", ".0f"),
        )
        made += [times, share]
        if any(row["metric"] == "energy" for row in mine):
            title = f"energy, J/token ↓, batch {batch}"
            made.append(grid(title, mine, lambda found: figure(found, "energy", ".3f")))
    timed = [row for row in rows if row["metric"] == "decode" and row["context"]]
    news = [row for row in rows if row["metric"] == "decode_new" and row["strategy"] != SAME]
    said = [
        f"Decode: {config['repeats']} rounds of {config['decode_steps']} steps after "
        f"{config['warmup']} of warm-up; context 0 is the step without. {'. '.join(notes(timed))}.",
        *off.lines(),
        *slower_when_new(timed, news),
    ]
    made[-1] = made[-1]._replace(notes=said)
    return made


def slower_when_new(timed: list[Row], news: list[Row]) -> list[str]:
    """Return the line that names who takes much longer at a length which is new to the process.

    In a loop that repeats lengths nobody else would see it, and a long answer meets each length
    once: cuDNN's attention, for one, plans anew for each.
    """
    usual = {(r["strategy"], r["batch"], r["context"]): r["value"] for r in timed}
    slow = [
        f"{r['strategy']} {r['value']:.1f} at {r['batch']} x {r['context']:,}"
        for r in news
        if r["value"] > MUCH * usual[r["strategy"], r["batch"], r["context"]]
    ]
    if not slow:
        return []
    return [f"In the first round, at lengths new to the process, ms/token: {', '.join(slow)}."]
