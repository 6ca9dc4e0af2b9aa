"""Methods that let tokens go: what they lose and cost, and what `auto` makes of it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import kvplug
from evals import suites
from evals.rows.tables import share
from evals.setup import shapes
from evals.setup.contenders import EXACT
from evals.suites import drift as drift_suite
from evals.suites import retrieval as retrieval_suite

from .lookup import apart, find, folders, rendered, step

if TYPE_CHECKING:
    from evals.report.runs import Run


def kept() -> str:
    """Return in a sentence what is found with few tokens, asked in the prompt and after it."""
    (run,) = folders("retrieval")
    name = "snapkv(budget=128)+int4"
    held, exact = (find(run, x, "bytes_held", 1, 2048)["value"] for x in (name, EXACT))
    asked, whole = (_found(run, x, "retrieval_asked") for x in (name, EXACT))
    later, later_whole = (_found(run, x, "retrieval") for x in (name, EXACT))
    return (
        f"Of a prompt of 2,048 tokens `{name}` holds {held / exact:.2f} of the exact cache's "
        f"bytes, and the model finds {asked} of the hidden words that the prompt asks for, with "
        f"the exact cache {whole}; what only a later question asks for is gone: {later}, with the "
        f"exact cache {later_whole}. In brackets 95 % intervals (Wilson)."
    )


def asked() -> str:
    """Return words found by methods that let tokens go, asked in the prompt and after it."""
    return _words("retrieval")


def unseen() -> str:
    """Return words found that are asked for after the text alone."""
    return _words("unseen")


def _words(name: str) -> str:
    (run,) = folders(name)
    (table,) = suites.get(run.suite).tables(run.config, run.rows)
    columns = [i for i, head in enumerate(table.head) if "greedy" not in head]
    body = [[row[i] for i in columns] for row in table.body]
    return f"{rendered([table.head[i] for i in columns], body)}\n\n{table.notes[0]}"


def _found(run: Run, strategy: str, metric: str) -> str:
    """Return the share of words found, at any depth, and its interval."""
    rows = retrieval_suite.pooled([r for r in run.rows if r["metric"] == metric])
    return share(next(row for row in rows if row["strategy"] == strategy), None)


def streaming() -> str:
    """Return what letting tokens go again and again costs a text that goes on."""
    body = []
    for run in folders("stream-heads", "stream", "stream-512"):
        exact = find(run, EXACT, "bytes_held", 1, 2048)["value"]
        for name in dict.fromkeys(row["strategy"] for row in run.rows):
            if name == EXACT or name.startswith("control:"):
                continue
            kl, top1 = (find(run, name, metric, 1, 2048) for metric in ("kl", "top1"))
            held = find(run, name, "bytes_held", 1, 2048)["value"]
            spread = f"{kl['value']:.4f} ({kl['p20']:.4f}-{kl['p80']:.4f})"
            body.append([name, f"{held / exact:.2f}x", spread, f"{top1['value']:.3f}"])
    table = rendered(["strategy", "held", "KL, nat (p20-p80 of windows) ↓", "top-1 ↑"], body)
    return f"{table}\n\n{drift_suite.method(run.config)}"


def choosing() -> str:
    """Return what choosing costs, of prefill and of decoding."""
    (run,) = folders("choosing")
    (table,) = suites.get(run.suite).tables(run.config, run.rows)
    return f"{rendered(table.head, table.body)}\n\n{table.notes[0]}"


def heads() -> str:
    """Return how long a decode step takes of heads of unlike budgets, and what they hold."""
    (run,) = folders("decode-heads")
    (context,) = run.config["context"]
    exact = find(run, EXACT, "bytes_held", 1, context)["value"]
    body = [
        [
            name,
            f"{find(run, name, 'bytes_held', 1, context)['value'] / exact:.2f}x",
            step(run, name, 1, context),
        ]
        for name in dict.fromkeys(row["strategy"] for row in run.rows)
        if not name.startswith("control:")
    ]
    return f"{rendered(['strategy', 'held', 'ms/token ↓'], body)}\n\n{apart(run)}"


@cache
def picks() -> str:
    """Return what `auto` takes for public models on 4 GiB, and the bytes that it predicts."""
    body = []
    asks = (
        ("none", None),
        ("low", None),
        ("medium", None),
        ("medium", "prompt"),
        ("medium", "stream"),
    )
    for name in ("llama-8b", "qwen3-8b", "mistral-7b", "gemma3-4b", "smollm2-1.7b"):
        for batch in (1, 8, 24):
            size = {"context": 8192, "batch": batch, "dtype": "bfloat16"}
            cells = []
            for drift, use in asks:
                choice = kvplug.recommend(
                    shapes.config(name), budget="4GiB", drift=drift, use=use, **size
                )
                best = choice.best
                cells.append("-" if best is None else f"`{best.spec}` {best.held / 2**30:.2f} GiB")
            body.append([name, f"{batch} x 8,192", *cells])
    heads = [f"drift='{drift}'" + (f", use='{use}'" if use else "") for drift, use in asks]
    return rendered(["model", "tokens", *heads], body)
