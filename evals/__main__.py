"""`python -m evals run | report | compare | list | validate`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.arguments import configured
from evals.setup.config import Config, ConfigError

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLES = """examples:
  python -m evals run
  python -m evals run --suite decode --context 2048,6000 --batch 1
  python -m evals run --strategies int4,sinks(sinks=4, window=1020)+int8 --context 6000
  python -m evals run --suite decode --model shape:llama-1b --dtype bfloat16 --context 4096
  python -m evals run config.toml --model Qwen/Qwen3-0.6B --dry-run
  python -m evals report results/* --html report.html
  python -m evals compare results/OLD results/NEW
"""
WRITTEN = {
    "html": "one page",
    "csv": "one table, every row",
    "latex": "one longtable",
    "parquet": "one table, every row",
}
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def parser() -> argparse.ArgumentParser:
    """Return the command line; `run` has one flag for every field of `Config`."""
    root = argparse.ArgumentParser(
        prog="python -m evals", description="Speed, memory and drift of KV caches.", epilog=EXAMPLES
    )
    root.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = root.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure, and write results/<config hash>/")
    check = commands.add_parser("validate", help="check a config without measuring")
    for command in (run, check):
        command.add_argument("file", type=Path, nargs="?", help="TOML file of the flags below")
        for f in fields(Config):
            many = {"nargs": "+", "action": "extend"} if f.type.startswith("tuple") else {}
            command.add_argument(
                "--" + f.name.replace("_", "-"),
                default=argparse.SUPPRESS,
                help=f"{f.metadata['doc']} ({f.default})",
                **many,
            )
    run.add_argument(
        "--out", type=Path, default=Path("results"), help="folder of result folders (results)"
    )
    run.add_argument("--dry-run", action="store_true", help="show the plan, measure nothing")
    run.add_argument("--again", action="store_true", help="discard what this config has measured")
    again = commands.add_parser("report", help="render tables, picture and page from a run's files")
    again.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    for kind, what in WRITTEN.items():
        again.add_argument(f"--{kind}", type=Path, metavar="FILE", help=f"{what} of all DIRs")
    two = commands.add_parser("compare", help="the figures of two runs, as ratios")
    two.add_argument("folders", type=Path, nargs=2, metavar="DIR")
    commands.add_parser("list", help="suites, rows by default, rivals, metrics")
    return root


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says.

    Returns 0, 1 if a row failed, 2 if the run cannot be or its results cannot be written, 130 if it
    was interrupted.
    """
    given = vars(parser().parse_args(argv))
    from rich.console import Console  # here, so that --help answers at once

    console = Console(width=None if sys.stdout.isatty() else 240)
    try:
        return COMMANDS[given.pop("command")](given, console)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


def run(given: dict[str, Any], console: Console) -> int:
    """Measure."""
    from evals.rows.store import WriteFailed
    from evals.run import run
    from evals.setup.model import FetchError

    out, dry, again = (given.pop(name) for name in ("out", "dry_run", "again"))
    try:
        return 0 if run(configured(given), out, console, again=again, dry=dry) else 1
    except (FetchError, WriteFailed) as error:
        raise ConfigError(str(error)) from error


def validate(given: dict[str, Any], console: Console) -> int:
    """Say what a config comes out as, or what is wrong with it."""
    from evals.setup import contenders

    config = configured(given)
    rows = contenders.resolve(config.strategies)
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name == "strategies":
            value = ", ".join(row.name for row in rows)
        console.print(f"{f.name:13} {value}", highlight=False, markup=False)
    return 0


def report(given: dict[str, Any], console: Console) -> int:
    """Render results again, each in its folder, and all of them in the files asked for."""
    from evals.report.export import WRITERS
    from evals.report.render import render
    from evals.report.runs import load

    good = all([render(folder, console) for folder in folders(given)])
    for kind in WRITTEN:
        if path := given[kind]:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                WRITERS[kind](load(given["folders"]), path)
            except OSError as error:
                raise ConfigError(f"cannot write {path}: {error}") from error
            console.print(f"{path}", highlight=False, markup=False)
    return 0 if good else 1


def compare(given: dict[str, Any], console: Console) -> int:
    """Show the figures of two runs."""
    from evals.report.compare import compare
    from evals.report.render import show_table

    show_table(compare(*folders(given)), console)
    return 0


def folders(given: dict[str, Any]) -> list[Path]:
    """Return the result folders named, if they are some."""
    for folder in given["folders"]:
        if not (folder / "env.json").exists():
            raise ConfigError(f"{folder} is no result folder: it has no env.json")
    return given["folders"]


def listing(given: dict[str, Any], console: Console) -> int:
    """Show suites, rows and metrics."""
    from evals import rivals, suites
    from evals.rows.schema import METRICS
    from evals.setup import shapes

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    for name in suites.names():
        say(f"--suite {name:9} {suites.get(name).__doc__.partition(chr(10))[0]}")
    say("rows by default: " + ", ".join(Config.strategies))
    say("rivals: " + ", ".join(rivals.modules()))
    say("any kvplug strategy is a row too: `kvplug list`")
    say("models of random weights: " + ", ".join(shapes.PREFIX + shape for shape in shapes.SHAPES))
    for name, metric in METRICS.items():
        say(f"{name:17} {metric.unit:9} {metric.better:7} {metric.doc}")
    return 0


COMMANDS = {
    "run": run,
    "validate": validate,
    "report": report,
    "compare": compare,
    "list": listing,
}


if __name__ == "__main__":
    sys.exit(main())
