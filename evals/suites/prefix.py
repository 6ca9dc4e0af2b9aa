"""Seconds to the first token of a prompt whose beginning is stored, against computing all of it.

Cases of each strategy: `alone`, a call without a store; `first`, one whose store, a folder, is
empty; `memory`, `file` and `redis` (a server of its own on this machine), one whose prompt is there
but for the end. Shorter prompts than a chunk have shorter chunks, to see from which length on reuse
pays. The rivals beside them are transformers' own: a copy of a cache that holds the beginning, its
documented recipe, `copied`; and its `prefill_chunk_size`, `cut`: what chunks cost without a store.
"""

from __future__ import annotations

import copy
import tempfile
from contextlib import ExitStack, closing
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
from kvplug.testing.server import NAMES, Server, binary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from evals.measure.session import Session
    from evals.rows.schema import Row
    from evals.setup.contenders import Contender

# beside whole chunks: the first tokens, which encoded caches hold before them, and 64 that are new
NEW = 64
MORE = Int4().first + NEW
DEFAULTS: dict[str, Any] = {
    "context": tuple(n + MORE for n in (CHUNK // 4, CHUNK // 2, CHUNK, 8 * CHUNK, 16 * CHUNK)),
    "strategies": ("growing", "int8", "int4"),
}
NEEDS = {"model", "text"}
STORED = ("memory", "file", "redis")


def tasks(session: Session) -> Iterator[Task]:
    """Yield a task per batch and context, all contenders in it."""
    for batch, context, note in session.cells():
        each = 2 + len(STORED)
        calls = (1 + session.config.repeats) * (4 + each * (len(session.contenders) - 1))
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
    chunk = chunk_for(context)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = started(folder, stack)
        calls = {(exact, "alone"): alone(session, exact, prompt)}
        calls |= {(Same(), "alone"): alone(session, exact, prompt)}
        if context > chunk:
            calls |= {(exact, "copied"): copied(session, prompt, chunk)}
            calls |= {(exact, "cut"): alone(session, exact, prompt, prefill_chunk_size=chunk)}
        stores: dict[tuple, kvplug.Store] = {}
        for i, contender in enumerate(others):
            calls[contender, "alone"] = alone(session, contender, prompt)
            if isinstance(contender, Rival):
                continue
            calls[contender, "first"] = first(session, contender, prompt, chunk)
            urls = {"memory": "memory://", "file": (folder / str(i)).as_uri()}
            if isinstance(server, Server):
                urls["redis"] = server.url
            else:
                yield at(measured("first_token", note=server), contender, **place, case="redis")
            for kind, url in urls.items():
                stores[contender, kind] = store = kvplug.Store(url)
                calls[contender, kind] = again(session, contender, prompt, store, chunk)
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


def chunk_for(context: int) -> int:
    """Return the tokens of a chunk: so many that a prompt has one before its new tokens."""
    return min(CHUNK, max(NEW, (context - MORE) // NEW * NEW))


def started(folder: Path, stack: ExitStack) -> Server | str:
    """Return a server that ends with `stack`, or why there is none."""
    if binary() is None:
        return f"none of {', '.join(NAMES)} is installed"
    try:
        return stack.enter_context(closing(Server(folder, on_port=True)))
    except ImportError as error:
        return str(error)


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


def alone(session: Session, contender: Contender, prompt: torch.Tensor, **kwargs: Any) -> Callable:
    """Return a call without a store."""

    def call() -> list[float]:
        given = contender.generate_arguments(session.model.config, prompt.shape[1] + 1)
        return ask(session, prompt, **given, **kwargs)

    return call


def first(session: Session, contender: Contender, prompt: torch.Tensor, chunk: int) -> Callable:
    """Return a call whose store is empty, a file's."""

    def call() -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            store = kvplug.Store(Path(folder).as_uri())
            return again(session, contender, prompt, store, chunk)()

    return call


def again(
    session: Session, contender: Contender, prompt: torch.Tensor, store: kvplug.Store, chunk: int
) -> Callable:
    """Return a call whose store has what the one before has left."""
    told = {"store": store, "chunk": chunk}
    return lambda: ask(session, prompt, cache_implementation=contender.name, cache_config=told)


def copied(session: Session, prompt: torch.Tensor, chunk: int) -> Callable:
    """Return a call with a copy of transformers' cache of the whole chunks."""
    known = prompt[:, : (prompt.shape[1] - 1) // chunk * chunk]
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
    notes = [f"Median of {config['repeats']} calls, each case once before.", *off.lines()]
    made[-1] = made[-1]._replace(notes=[*notes, *pays(rows)])
    return made


def pays(rows: list[Row]) -> list[str]:
    """Return a line on how many reused tokens are enough to be faster than the exact cache."""
    figures: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row["case"] in STORED and row["status"] == "ok":
            place = row["strategy"], row["case"], row["batch"], row["context"]
            figures.setdefault(place, {})[row["metric"]] = row["value"]
    least: dict[str, float] = {}
    for (name, case, *_), own in figures.items():
        if own.get("reused") and own["speedup"] > 1:
            key = f"{name} from {case}"
            least[key] = min(own["reused"], least.get(key, own["reused"]))
    told = ", ".join(f"{name} {n:,.0f}" for name, n in least.items())
    return [f"Fewest reused tokens that made a call faster than computing all: {told}."]
