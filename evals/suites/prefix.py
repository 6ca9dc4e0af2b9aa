"""Seconds to the first token of a prompt whose beginning is stored, against computing all of it.

Cases of each strategy: `alone`, a call without a store; `first`, one whose store is empty; `memory`
and `file`, one whose prompt is there but for the end. The rival beside them is the recipe that
transformers documents: a copy of a cache that holds the beginning, `copied`.
"""

from __future__ import annotations

import copy
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import kvplug
from evals.measure.clock import timed
from evals.measure.interleave import interleave, pooled, speedup
from evals.rows.noise import Noise
from evals.rows.schema import at, failed, measured
from evals.rows.tables import Table, figure, grid, timing
from evals.rows.task import Task
from evals.setup.contenders import EXACT, Rival
from evals.setup.control import Same
from kvplug.codecs.rotated import Int4
from kvplug.compat import cache_argument
from kvplug.prefix import CHUNK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from evals.measure.session import Session
    from evals.rows.schema import Row
    from evals.setup.contenders import Contender

# beside whole chunks: the first tokens, which encoded caches hold before them, and 64 that are new
MORE = Int4().first + 64
DEFAULTS: dict[str, Any] = {
    "context": (CHUNK + MORE, 8 * CHUNK + MORE, 16 * CHUNK + MORE),
    "strategies": ("growing", "int8", "int4"),
}
NEEDS = {"model", "text"}
STORED = ("memory", "file")


def tasks(session: Session) -> Iterator[Task]:
    """Yield a task per batch and context, all contenders in it."""
    for batch, context, note in session.cells():
        calls = (1 + session.config.repeats) * (3 + 4 * (len(session.contenders) - 1))
        yield Task(
            f"prefix/b{batch}/t{context}",
            f"batch {batch}, a prompt of {context:,}",
            session.contenders[0],
            lambda cell=(batch, context, note): measure(session, *cell),
            calls * batch * session.machine.prefill(context),
            6 * session.filler.exact_bytes(batch, context),
            calls,
        )


def measure(
    session: Session, batch: int, context: int, note: str | None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one batch and context."""
    exact, *others = session.contenders
    prompt, place = session.prompt(batch, context), {"batch": batch, "context": context}
    with tempfile.TemporaryDirectory() as folder:
        calls = {(exact, "alone"): alone(session, exact, prompt)}
        calls |= {(Same(), "alone"): alone(session, exact, prompt)}
        if context > CHUNK:
            calls |= {(exact, "copied"): copied(session, prompt)}
        stores: dict[tuple, kvplug.Store] = {}
        for i, contender in enumerate(others):
            calls[contender, "alone"] = alone(session, contender, prompt)
            if isinstance(contender, Rival):
                continue
            calls[contender, "first"] = first(session, contender, prompt)
            for kind in STORED:
                url = "memory://" if kind == "memory" else (Path(folder) / str(i)).as_uri()
                stores[contender, kind] = store = kvplug.Store(url)
                calls[contender, kind] = again(session, contender, prompt, store)
        rounds = interleave(calls, 1 + session.config.repeats, session.tick)
        for key, own in rounds.items():
            if not isinstance(own, Exception):
                rounds[key] = own[1:]  # the first compiles, and stores
        for (contender, case), own in rounds.items():
            here = place | {"case": case}
            if isinstance(own, Exception):
                yield at(failed(own), contender, **here)
                continue
            yield at(measured("first_token", *pooled(own), note=note), contender, **here)
            if ratio := speedup(own, rounds[exact, "alone"]):
                yield at(ratio, contender, **here)
            if (store := stores.get((contender, case))) is not None:
                told = store.stats()
                reused = told["reused_tokens"] / (session.config.repeats * batch)
                stored = told["bytes_written"] / (reused * batch) if reused else 0.0
                yield at(measured("reused", reused), contender, **here)
                yield at(measured("stored_per_token", stored), contender, **here)


def ask(session: Session, prompt: torch.Tensor, **kwargs: Any) -> list[float]:
    """Return the seconds of a call of `generate` for one token."""
    call = partial(
        session.model.generate,
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=0,
        **kwargs,
    )
    return [timed(session.model.device, call)]


def alone(session: Session, contender: Contender, prompt: torch.Tensor) -> Callable:
    """Return a call without a store."""
    return lambda: ask(
        session, prompt, **contender.generate_arguments(session.model.config, prompt.shape[1] + 1)
    )


def first(session: Session, contender: Contender, prompt: torch.Tensor) -> Callable:
    """Return a call whose store is empty, a file's."""

    def call() -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            store = {"store": kvplug.Store(Path(folder).as_uri())}
            return ask(session, prompt, cache_implementation=contender.name, cache_config=store)

    return call


def again(
    session: Session, contender: Contender, prompt: torch.Tensor, store: kvplug.Store
) -> Callable:
    """Return a call whose store has what the one before has left."""
    return lambda: ask(
        session, prompt, cache_implementation=contender.name, cache_config={"store": store}
    )


def copied(session: Session, prompt: torch.Tensor) -> Callable:
    """Return a call with a copy of transformers' cache of the whole chunks."""
    known = prompt[:, : (prompt.shape[1] - 1) // CHUNK * CHUNK]
    cache = session.contenders[0].build(session.model.config, prompt.shape[1] + 1)
    with torch.no_grad():
        session.model(known, **cache_argument(cache), logits_to_keep=1)

    def call() -> list[float]:
        seconds: list[float] = []
        own: list[Any] = []
        seconds.append(timed(prompt.device, lambda: own.append(copy.deepcopy(cache))))
        return [seconds[0] + ask(session, prompt, **cache_argument(own[0]))[0]]

    return call


def tables(config: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Return a table of times per batch, and one of what stores hold."""
    off = Noise(rows)
    made = []
    for batch in config["batch"]:
        named = [
            row | {"strategy": f"{row['strategy']}, {row['case']}"}
            for row in rows
            if row["batch"] == batch
        ]
        made.append(
            grid(
                f"first token, s ↓ (times as fast as {EXACT} ↑), batch {batch}",
                named,
                timing("first_token", ".3f", off),
            )
        )
        made.append(
            grid(
                f"tokens reused ↑ (B/token stored ↓), batch {batch}",
                [row for row in named if row["case"] in STORED],
                lambda found: (
                    f"{figure(found, 'reused', ',.0f')} "
                    f"({figure(found, 'stored_per_token', ',.0f')})"
                ),
            )
        )
    made[-1] = made[-1]._replace(
        notes=[f"Median of {config['repeats']} calls, each case once before.", *off.lines()]
    )
    return made
