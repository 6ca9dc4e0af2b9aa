"""`python -m evals run | report | list`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from evals.config import Config, ConfigError, split_specs

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLES = """examples:
  python -m evals run
  python -m evals run --strategies int4,sinks(sinks=4, window=1020)+int8 --context 6000
  python -m evals run --model Qwen/Qwen3-0.6B --dataset book.txt --windows 4
  python -m evals report results/*
"""


def parser() -> argparse.ArgumentParser:
    """Return the command line; `run` has one flag for every field of `Config`."""
    root = argparse.ArgumentParser(
        prog="python -m evals", description="Speed, memory and drift of KV caches.", epilog=EXAMPLES
    )
    root.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = root.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure, and write results/<config hash>/")
    for f in fields(Config):
        flag, kind = "--" + f.name.replace("_", "-"), int if f.type.startswith("int") else str
        more = {"nargs": "+", "action": "extend"} if f.name == "strategies" else {"type": kind}
        run.add_argument(
            flag, default=argparse.SUPPRESS, help=f"{f.metadata['doc']} ({f.default})", **more
        )
    run.add_argument(
        "--out", type=Path, default=Path("results"), help="folder of result folders (results)"
    )
    again = commands.add_parser("report", help="render table and picture again from a run's files")
    again.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    commands.add_parser("list", help="rows by default, rivals, metrics")
    return root


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; return 0, 1 if a row failed, 2 if the run cannot be."""
    given = vars(parser().parse_args(argv))
    command, out, folders = given.pop("command"), given.pop("out", None), given.pop("folders", [])
    from rich.console import Console  # here, so that --help answers at once

    console = Console(width=None if sys.stdout.isatty() else 240)
    try:
        if command == "run":
            from evals.model import FetchError
            from evals.run import run

            if "strategies" in given:
                given["strategies"] = tuple(
                    s for text in given["strategies"] for s in split_specs(text)
                )
            try:
                return 0 if run(Config(**given), out, console) else 1
            except FetchError as error:
                raise ConfigError(str(error)) from error
        if command == "report":
            from evals.report import render

            return 0 if all([render(folder, console) for folder in folders]) else 1
        return listing(console)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def listing(console: Console) -> int:
    """Show the rows and the metrics."""
    from evals import rivals
    from evals.schema import METRICS

    console.print("rows by default: " + ", ".join(Config.strategies), highlight=False, markup=False)
    console.print("rivals: " + ", ".join(rivals.names()), highlight=False)
    console.print("any kvplug strategy is a row too: `kvplug list`", highlight=False)
    for name, metric in METRICS.items():
        console.print(
            f"{name:17} {metric.unit:9} {metric.better:7} {metric.doc}",
            highlight=False,
            markup=False,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
