"""Table and picture from a run's files, and from nothing else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from evals import picture
from evals.schema import METRICS
from evals.strategies import EXACT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rich.console import Console

    from evals.schema import Row

ARROWS = {"lower": "↓", "higher": "↑", "zero": "→0"}


def mb(row: Row, exact: Row | None) -> str:
    """Megabytes, and how many times the exact cache's."""
    times = f" ({row['value'] / exact['value']:.2f}x)" if exact and exact["value"] else ""
    return f"{row['value'] / 1e6:.1f}{times}"


def spread(row: Row, exact: Row | None) -> str:
    """Median, and the 20th and 80th percentile."""
    return f"{row['value']:.1f} ({row['p20']:.1f}-{row['p80']:.1f})"


def number(digits: int, sign: str = "") -> Callable[[Row, Row | None], str]:
    """Return a formatter for plain figures; rounded first, so that there is no -0.00."""
    return lambda row, exact: f"{round(row['value'], digits) + 0.0:{sign}.{digits}f}"


# Column: what it shows, under which head, and how.
COLUMNS = {
    "bytes_held": ("held, MB", mb),
    "peak_prefill": ("peak prefill, MB", mb),
    "peak_decode": ("peak decode, MB", mb),
    "prefill": ("prefill, s", number(2)),
    "decode": ("decode, ms/token (p20-p80)", spread),
    "perplexity": ("perplexity", number(4)),
    "perplexity_delta": ("Δ perplexity, %", number(2, "+")),
    "kl": ("KL, nat", number(6)),
    "top1": ("top-1", number(4)),
    "greedy": ("greedy, tokens", number(0)),
}


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[Row]]:
    """Return config, environment and rows of a run."""
    config, env = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("config.json", "env.json")
    )
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return config, env, [json.loads(line) for line in lines]


def render(folder: Path, console: Console) -> bool:
    """Write table.md and picture.png into the run's folder, show the table; say whether no row
    failed.
    """
    config, env, rows = read(folder)
    head, body, failures = table(rows)
    under = caption(config, env, rows)
    (folder / "table.md").write_text(markdown(head, body, failures, under), encoding="utf-8")
    (folder / "picture.png").write_bytes(picture.draw(rows, under[0]))

    shown = Table(*head, title=folder.name, caption=Text("\n".join(under)), box=SIMPLE, padding=0)
    shown.columns[0].no_wrap = True
    for cells in body:
        shown.add_row(*cells, style="red" if cells[0] in failures else None)
    console.print(shown)
    for name, error in failures.items():
        console.print(f"failed {name}: {error}", style="red", highlight=False, markup=False)
    console.print(f"{folder}: table.md, picture.png, rows.jsonl", highlight=False)
    return not failures


def table(rows: list[Row]) -> tuple[list[str], list[list[str]], dict[str, str]]:
    """Return heads, cells per strategy in order of measuring, and errors of those that failed."""
    by_strategy: dict[str, dict[str | None, Row]] = {}
    for row in rows:
        by_strategy.setdefault(row["strategy"], {})[row["metric"]] = row
    exact = by_strategy.get(EXACT, {})

    head = [
        "strategy",
        *(f"{title} {ARROWS[METRICS[key].better]}" for key, (title, _) in COLUMNS.items()),
        "kernel",
    ]
    body, failures = [], {}
    for name, figures in by_strategy.items():
        cells = [cell(figures.get(key), exact.get(key), show) for key, (_, show) in COLUMNS.items()]
        body.append([name, *cells, kernels(figures)])
        if None in figures:
            failures[name] = figures[None]["error"]
            body[-1][-1] = "failed"
    return head, body, failures


def cell(row: Row | None, exact: Row | None, show: Callable[[Row, Row | None], str]) -> str:
    """Return a figure as text: a dash where there is none."""
    return "-" if row is None or row["value"] is None else show(row, exact)


def kernels(figures: dict[str | None, Row]) -> str:
    """Return which kernels the decode run used, and how often a compressed cache was made dense."""
    stats = (figures.get("decode") or {}).get("stats") or {}
    dense = sum((stats.get("materialised") or {}).values())
    return (
        ", ".join([*stats.get("kernels", {}), *([f"dense x{dense}"] if dense else [])]) or "torch"
    )


def caption(config: dict[str, Any], env: dict[str, Any], rows: list[Row]) -> list[str]:
    """Return the lines without which the figures mean nothing."""
    versions = ", ".join(f"{name} {value}" for name, value in env["versions"].items() if value)
    notes = {row["metric"]: row["note"] for row in rows if row["note"]}
    return [
        f"{env['model']}, {config['dtype']} on {env['hardware']}, {env['threads']} threads; "
        f"batch {config['batch']}, context {config['context']}.",
        f"Drift: {config['windows']} windows of {config['window']} tokens of {env['dataset']}, "
        f"fed {config['chunk']} at a time, first {config['skip']} skipped. "
        f"Decode: {config['decode_steps']} steps after {config['warmup']} of warm-up. "
        f"Peak memory: {notes.get('peak_decode')}. Greedy: of {config['new_tokens']} tokens.",
        f"kvplug {env['git'] or 'outside git'}; {versions}. Placed on {env['placement']}.",
    ]


def markdown(
    head: list[str], body: list[list[str]], failures: dict[str, str], under: list[str]
) -> str:
    """Return the table, its failures and its caption."""
    lines = [
        head,
        ["---"] + ["---:"] * (len(head) - 2) + ["---"],
        *([f"`{r[0]}`", *r[1:]] for r in body),
    ]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"
    for name, error in failures.items():
        text += f"\n- `{name}` failed: {' '.join(error.split())}\n"
    return text + "\n" + "\n".join(f"{line}  " for line in under) + "\n"
