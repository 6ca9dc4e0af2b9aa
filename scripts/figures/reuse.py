"""Prompts whose beginning is stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evals.setup.contenders import EXACT
from evals.suites import prefix as prefix_suite

from .lookup import find, folders, rendered

if TYPE_CHECKING:
    from evals.report.runs import Run


def prefix() -> str:
    """Return seconds to the first token of prompts whose beginning is stored, and what that costs.

    transformers' own cache: as its documented recipe copies it, and fed by `prefill_chunk_size`.
    """
    runs = folders("prefix", "prefix-4096")
    table = _first_tokens([(run, max(run.config["context"])) for run in runs])
    (pays,) = prefix_suite.pays(runs[0].rows)
    return f"{table} {pays}"


def prefix_one_thread() -> str:
    """Return the same of one thread."""
    (run,) = folders("prefix-1-thread")
    return _first_tokens([(run, context) for context in run.config["context"]])


def _first_tokens(prompts: list[tuple[Run, int]]) -> str:
    body = [_reused(*x, name) for x in prompts for name in (EXACT, "growing", "int8", "int4")]
    head = ["strategy", "prompt", "s ↓, all computed", "from memory", "from a folder", "from Redis"]
    head += ["nothing found, % more ↓", "B/token ↓"]
    run = prompts[0][0]
    notes = prefix_suite.tables(run.config, run.rows)[-1].notes
    noise = next(note for note in notes if note.startswith("A/A")).partition(";")[0]
    return f"{rendered(head, body)}\n\n{noise}."


def _reused(run: Run, context: int, name: str) -> list[str]:
    """Return the line of a strategy."""

    def value(metric: str, case: str) -> float:
        return find(run, name, metric, 1, context, case)["value"]

    def cell(case: str) -> str:
        return f"{value('first_token', case):.2f} ({value('speedup', case):.1f}x)"

    if name == EXACT:
        loaded, cold, held = [cell("copied"), "-", "-"], "cut", "-"
    else:
        loaded, cold = [cell(case) for case in prefix_suite.STORED], "first"
        held = f"{value('stored_per_token', 'file'):,.0f}"
    whole = value("first_token", "alone")
    more = 100 * (value("first_token", cold) / whole - 1)
    return [name, f"{context:,}", f"{whole:.2f}", *loaded, f"{more:+.0f}", held]
