"""Tables, picture and page from a run's files, and from nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Table as Grid
from rich.text import Text

from evals import suites
from evals.report import export, front, picture
from evals.report.runs import load, read

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from evals.rows.schema import Row
    from evals.rows.tables import Table


def render(folder: Path, console: Console) -> bool:
    """Write table.md, report.html and, where there is one, a picture into the run's folder, show
    the tables; say whether no row failed.
    """
    config, env, rows = read(folder)
    suite = suites.get(config["suite"])
    tables = suite.tables(config, rows) if rows else []
    under, failures = caption(config, env), errors(rows)
    (folder / "table.md").write_text(markdown(tables, failures, under), encoding="utf-8")
    if png := picture.draw(rows, under[0]):
        (folder / "picture.png").write_bytes(png)
    if svg := front.draw(rows, under[0]):
        (folder / "front.svg").write_text(svg, encoding="utf-8")
    export.html(load([folder]), folder / "report.html")

    console.print(folder.name, style="bold", highlight=False)
    for table in tables:
        show_table(table, console)
    for line in under:
        console.print(line, style="dim", highlight=False, markup=False)
    for name, stopped in failures.items():
        for error in stopped:
            console.print(f"failed {name}: {error}", style="red", highlight=False, markup=False)
    files = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file()))
    console.print(f"{folder}: {files}", highlight=False)
    return not failures


def show_table(table: Table, console: Console) -> None:
    """Print a table."""
    console.print(table.title, style="italic", highlight=False, markup=False)
    grid = Grid(*table.head, box=SIMPLE, padding=(0, 1, 0, 0))
    grid.columns[0].no_wrap = True
    for cells in table.body:
        grid.add_row(*map(Text, cells), style="red" if "failed" in cells[1:] else None)
    console.print(grid)
    for line in table.notes:
        console.print(line, highlight=False, markup=False)


def errors(rows: list[Row]) -> dict[str, list[str]]:
    """Return errors by strategy, each once."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["status"] == "failed":
            found.setdefault(row["strategy"], {})[row["error"]] = None
    return {name: list(own) for name, own in found.items()}


def caption(config: dict[str, Any], env: dict[str, Any]) -> list[str]:
    """Return the lines without which the figures mean nothing."""
    versions = ", ".join(f"{name} {value}" for name, value in env["versions"].items() if value)
    measured_on = ", ".join(env[name] for name in ("model", "dataset") if env[name])
    return [
        f"{measured_on or 'no model'}; {config['dtype']} on {env['hardware']}, "
        f"{env['threads']} threads.",
        f"kvplug {env['git'] or 'outside git'}; {versions}. Placed on {env['placement']}.",
    ]


def markdown(tables: list[Table], failures: dict[str, list[str]], under: list[str]) -> str:
    """Return the tables, what failed and the caption."""
    text = ""
    for table in tables:
        if table.title:
            text += f"**{table.title}**\n\n"
        lines = [
            table.head,
            ["---", *("---" if name == "kernel" else "---:" for name in table.head[1:])],
            *([f"`{cells[0]}`", *cells[1:]] for cells in table.body),
        ]
        text += "".join("| " + " | ".join(cells) + " |\n" for cells in lines) + "\n"
        text += "".join(f"{line}  \n" for line in table.notes) + "\n" * bool(table.notes)
    for name, stopped in failures.items():
        text += "".join(f"- `{name}` failed: {' '.join(error.split())}\n" for error in stopped)
    return text + "\n" * bool(failures) + "".join(f"{line}  \n" for line in under)
