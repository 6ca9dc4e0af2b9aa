"""Milliseconds per decoded token over contexts and batches, against what the memory allows.

All strategies of a context and batch run in one loop, in alternating order, each round with a new
cache filled with random numbers. The floor is predicted before measuring: the step that has no
context, plus the stored bytes of keys and values over the machine's bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from evals.measure.clock import step
from evals.measure.interleave import interleave, pooled, speedup
from evals.measure.memory import checked_bytes, no_room
from evals.rows.noise import Noise
from evals.rows.schema import at, failed, measured
from evals.rows.tables import Table, figure, grid, notes, timing
from evals.rows.task import Task
from evals.setup.config import STRATEGIES
from evals.setup.contenders import EXACT
from evals.setup.control import SAME, Same

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evals.measure.session import Session
    from evals.rows.schema import Row
    from evals.setup.contenders import Contender

DEFAULTS: dict[str, Any] = {
    "strategies": (*STRATEGIES, "transformers:fp8"),
    "context": (512, 1024, 2048, 4096, 6000, 8000),
    "batch": (1, 4, 8),
    "decode_steps": 12,
}
NEEDS = {"model"}
MUCH = 1.3  # times as long: worth a line


def tasks(session: Session) -> Iterator[Task]:
    """Yield a task per batch and context, all contenders in it; and the steps without context."""
    config, exact = session.config, session.contenders[0]
    steps = config.warmup + config.decode_steps
    yield Task("decode/empty", "no context", exact, lambda: empty(session), 1.0)
    contenders = [*session.contenders, Same()]
    for batch, context, note in session.cells():
        round_s = sum(
            session.predict.fill(s, batch, context)
            + steps * session.predict.step(s, batch, context)
            for s in contenders
        )
        size = session.filler.exact_bytes(batch, context)
        yield Task(
            f"decode/b{batch}/t{context}",
            f"batch {batch}, context {context:,}",
            exact,
            lambda cell=(batch, context, note): measure(session, contenders, *cell),
            config.repeats * round_s,
            2 * size,
            config.repeats * len(contenders),
        )


def empty(session: Session) -> Iterator[dict[str, Any]]:
    """Yield the exact cache's step at next to no context, per batch."""
    for batch in session.config.batch:
        seconds = session.machine.step(batch)
        yield at(measured("decode", 1000 * seconds), batch=batch, context=0)


def measure(
    session: Session, contenders: list[Contender], batch: int, context: int, note: str | None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one batch and context."""
    place = {"batch": batch, "context": context}
    runners = {}
    for contender in contenders:
        try:
            need = needed(session, contender, batch, context)
            if reason := no_room(need, session.device):
                yield at(measured("decode", note=reason), contender, **place)
            else:
                runners[contender] = DecodeRound(session, contender, batch, context)
        except Exception as error:  # it cannot be built: its row says so
            yield at(failed(error), contender, **place)
    rounds = interleave(runners, session.config.repeats, session.tick)
    reference = rounds.get(session.contenders[0], ValueError())
    how = "; ".join(text for text in (session.filler.note, note) if text)
    for contender, runner in runners.items():
        if isinstance(rounds[contender], Exception):
            yield at(failed(rounds[contender]), contender, **place)
            continue
        for row in runner.rows(rounds[contender], reference, how):
            yield at(row, contender, **place)


@dataclass
class DecodeRound:
    """One contender in the loop: each call is a round with a cache of its own."""

    session: Session
    contender: Contender
    batch: int
    context: int
    held: int | None = None
    stats: dict[str, Any] | None = None
    energy: list[float] = field(default_factory=list)  # joules per token, of each round

    def __call__(self) -> list[float]:
        """Return milliseconds of each timed step."""
        model, config = self.session.model, self.session.config
        steps = config.warmup + config.decode_steps
        cache = self.contender.build(model.config, self.context + steps)
        self.session.filler.fill(cache, self.batch, self.context)
        token = torch.ones(self.batch, 1, dtype=torch.long, device=model.device)
        times = []
        meter = self.session.meter or (lambda: 0.0)
        for number in range(steps):
            if number == config.warmup:
                before = meter()
            token, seconds = step(model, cache, token)
            times.append(1000 * seconds)
        if self.session.meter:
            self.energy.append((meter() - before) / (config.decode_steps * self.batch))
        self.held = self.held or checked_bytes(cache)  # room that growth reserves included
        self.stats = cache.stats() if hasattr(cache, "stats") else None
        return times[config.warmup :]

    def rows(
        self, rounds: list[list[float]], reference: list[list[float]] | Exception, note: str
    ) -> Iterator[dict[str, Any]]:
        """Yield what the rounds say."""
        times = pooled(rounds)
        low = 1000 * floor(self.session, self.contender, self.batch, self.context)
        yield measured("decode", *times, note=note, stats=self.stats)
        if len(rounds) > 1:
            yield measured("decode_new", *rounds[0])
        yield measured("throughput", *(1000 * self.batch / x for x in times))
        if ratio := speedup(rounds, reference):
            yield ratio
        if self.energy:
            yield measured("energy", *self.energy)
        yield measured("floor", low)
        yield measured("floor_share", *(100 * low / x for x in times))
        yield measured("bytes_held", self.held)


def floor(session: Session, contender: Contender, batch: int, context: int) -> float:
    """Predict the seconds that a step cannot do without."""
    return (
        session.machine.step(batch)
        + batch * stored(session, contender, context) / session.machine.bandwidth
    )


def stored(session: Session, contender: Contender, context: int) -> int:
    """Return the bytes per row that attention must read: reserved room beyond the tokens is not."""
    return min(
        session.filler.stored_bytes(contender, context),
        session.filler.exact_bytes(1, context) or 1 << 62,
    )


def needed(session: Session, contender: Contender, batch: int, context: int) -> int:
    """Return the bytes that decoding takes: the cache as it comes, and one layer of it in full
    precision a few times over.
    """
    filler = session.filler
    layer = filler.exact_bytes(batch, context) // max(1, len(filler.like or ()))
    return batch * filler.stored_bytes(contender, context) + 4 * layer


def forecast(session: Session) -> list[Table]:
    """Return the floors, predicted."""
    machine, cells = session.machine, list(session.cells())
    told = []
    for batch in session.config.batch:
        contexts = [context for b, context, _ in cells if b == batch]
        body = []
        for contender in session.contenders:
            try:
                floors = [1000 * floor(session, contender, batch, context) for context in contexts]
                body.append([contender.name, *(f"{x:.1f}" for x in floors)])
            except Exception as error:  # measuring it will say the same, in its row
                body.append([contender.name, f"{type(error).__name__}: {error}"[:60]])
        title = f"predicted floor, ms/token ↓, batch {batch}"
        said = [
            f"Step without context {1000 * machine.step(batch):.1f} ms (its "
            f"{machine.weight_bytes / 1e6:.0f} MB of weights alone "
            f"{1000 * machine.weight_bytes / machine.bandwidth:.1f} ms), plus stored K/V bytes at "
            f"{machine.bandwidth / 1e9:.1f} GB/s."
        ]
        told.append(Table(title, ["strategy", *(f"{x:,}" for x in contexts)], body, said))
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
