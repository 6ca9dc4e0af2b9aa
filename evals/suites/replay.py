"""Turns of a chat, and questions to one document: tokens and time that a store of prompts saves.

A chat's prompt is all that was said before and a new turn; a document's is the document and a
question. Each is asked of every strategy before the next one is; stores are files, empty at first.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import kvplug
from evals.rows.schema import at, failed, measured
from evals.rows.tables import Table
from evals.rows.task import Task
from evals.setup.contenders import EXACT, Rival
from evals.suites.prefix import ask
from kvplug.prefix import CHUNK

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from evals.measure.session import Session
    from evals.rows.schema import Row

TURNS, QUESTIONS, QUESTION = 10, 5, 48  # a question's tokens
DEFAULTS: dict[str, Any] = {
    "context": (8 * CHUNK,),
    "strategies": ("growing", "int8", "int4"),
}
NEEDS = {"model", "text"}
CASES = {
    "chat": f"a chat of {TURNS} turns",
    "document": f"{QUESTIONS} questions to one document",
}


def tasks(session: Session) -> Iterator[Task]:
    """Yield a task per batch, context and case, all contenders in it."""
    for batch, context, note in session.cells():
        for case, prompts in (
            ("chat", chat(session, batch, context)),
            ("document", document(session, batch, context)),
        ):
            calls = len(prompts) * len(session.contenders)
            seconds = sum(session.machine.prefill(x.shape[1]) for x in prompts) * batch
            yield Task(
                f"replay/{case}/b{batch}/t{context}",
                f"{CASES[case]}, batch {batch}, up to {context:,} tokens",
                session.contenders[0],
                lambda cell=(case, prompts, batch, context, note): measure(session, *cell),
                seconds * len(session.contenders),
                2 * session.filler.exact_bytes(batch, context),
                calls,
            )


def chat(session: Session, batch: int, context: int) -> list[torch.Tensor]:
    """Return the prompts of a chat, each longer than the one before by as much, up to `context`."""
    said = session.prompt(batch, context)
    return [said[:, : context * turn // TURNS] for turn in range(1, TURNS + 1)]


def document(session: Session, batch: int, context: int) -> list[torch.Tensor]:
    """Return prompts [batch, context] that differ in their last tokens, questions of other text."""
    text, n = session.prompt(batch, context), QUESTION
    prompts = []
    for i in range(QUESTIONS):
        prompts.append(text.clone())
        prompts[-1][:, -n:] = text[:, i * n : (i + 1) * n]
    return prompts


def measure(
    session: Session, case: str, prompts: list[torch.Tensor], batch: int, context: int, note: str
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one case."""
    place = {"batch": batch, "context": context, "case": case}
    seconds: dict[Any, list[float] | Exception] = {x: [] for x in session.contenders}
    stores = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, contender in enumerate(session.contenders):
            if not isinstance(contender, Rival):
                stores[contender] = kvplug.Store((Path(folder) / str(i)).as_uri())
        ask(session, prompts[0])  # what a first call does once
        for prompt in prompts:
            for contender, own in seconds.items():
                if isinstance(own, Exception):
                    continue
                store = stores.get(contender)
                given = contender.generate_arguments(session.model.config, prompt.shape[1] + 1)
                if store is not None:
                    given["cache_config"] = {"store": store}
                try:
                    own += ask(session, prompt, **given)
                except Exception as error:  # its row says so
                    seconds[contender] = error.with_traceback(None)
                session.tick()
        whole = batch * sum(x.shape[1] for x in prompts)
        exact = seconds[session.contenders[0]]
        for contender, own in seconds.items():
            if isinstance(own, Exception):
                yield at(failed(own), contender, **place)
                continue
            mean = float(np.mean(own))
            yield at(measured("first_token", *own, value=mean, note=note), contender, **place)
            if not isinstance(exact, Exception):
                yield at(measured("speedup", sum(exact) / sum(own)), contender, **place)
            if contender in stores:
                reused = stores[contender].stats()["reused_tokens"]
                yield at(measured("reused_share", reused / whole), contender, **place)


def tables(config: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Return a table: a line per strategy, three columns per case."""
    figures = {
        (r["strategy"], r["batch"], r["context"], r["case"], r["metric"]): r["value"] for r in rows
    }
    made = []
    for batch, context in sorted({(r["batch"], r["context"]) for r in rows}):
        head, body = ["strategy"], []
        for what in CASES.values():
            head += [f"{what}: tokens reused, % ↑", "s to the first token ↓", f"vs {EXACT} ↑"]
        for name in dict.fromkeys(r["strategy"] for r in rows):
            cells = []
            for case in CASES:
                share, seconds, speedup = (
                    figures.get((name, batch, context, case, metric))
                    for metric in ("reused_share", "first_token", "speedup")
                )
                cells += [
                    "-" if share is None else f"{100 * share:.0f}",
                    "failed" if seconds is None else f"{seconds:.2f}",
                    "-" if speedup is None else f"{speedup:.1f}x",
                ]
            body.append([name, *cells])
        note = "Mean of all prompts, each asked once; the first one finds nothing."
        title = f"prompts of up to {context:,} tokens that come again, batch {batch}"
        made.append(Table(title, head, body, [note]))
    return made
