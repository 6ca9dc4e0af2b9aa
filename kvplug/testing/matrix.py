"""Every strategy on every architecture in every call: what is exact, refused or broken.

    python -m kvplug.testing.matrix --write docs/compatibility.md
    python -m kvplug.testing.matrix --cell "llama / beams / int4"

A cell's outcome is found, never declared:

exact       the tokens and scores of transformers' `DynamicCache`
bound       what was stored is within the codec's own bound of what the model wrote, in the columns
            that retention promises, and attention is that over the same content in a dense tensor
refused     a `KvplugError` before the model ran, or `Unseen` once attention has shown no query
n/a         transformers itself cannot do this call on this model, with `DynamicCache`
crashed     any other error, or a refusal after the model ran
wrong       none of the above

Sequences are about 30 tokens long; blocks and windows are small, so that these reach every edge.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import random
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from ..errors import KvplugError, Unseen
from ..retention.base import Scored
from ..spec import parse
from .architectures import ARCHITECTURES, Absent, make
from .calls import (
    CALLS,
    ROWS,
    Caller,
    NoSuchCall,
    Run,
    alone,
    check_as_near,
    check_equal,
    check_first,
    in_dtype,
)
from .heads import calibrated
from .oracle import kept_whole
from .rotation import check_rotation
from .shadow import Shadow, Wrong
from .specs import SMALL
from .tools import prompt

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

OUTCOMES = ("exact", "bound", "refused", "n/a", "crashed", "wrong")
LENGTH = 64  # more tokens than any call sees
HEADS = "calibration.safetensors"  # in whose place each model's own is read
CHOOSING = ("snapkv", "expected", "keydiff", "h2o", "tova", "lagkv", "pyramid")
STRATEGIES = {
    "growing": "growing",
    "static": "static",
    "int8": "int8(block=8)",
    "int4": "int4(block=8, tail=8, first=1)",
    "static+int4": "static+int4(block=8, tail=8, first=1)",
    "window": "window(length=20)",
    "sinks": "sinks(sinks=2, window=14)",
    "window+int8": "window(length=20)+int8(block=8)",
    "host": "exact(block=8)+host",
    "disk": "exact(block=8)+disk",
    "int4+host": "int4(block=8, tail=8, first=1)+host",
    "sinks+int8": "sinks(sinks=2, window=14)+int8(block=8)",
    "long window": "window(length=100)",
    "long sinks": "sinks(sinks=2, window=100)",
    **{name: SMALL[name] for name in CHOOSING},
    "snapkv+int4": "snapkv(budget=10, every=3, window=4)+int4(block=8, tail=0)",
    "expected+int8+host": f"{SMALL['expected']}+int8(block=8, tail=0)+host",
    "keydiff+disk": f"{SMALL['keydiff']}+exact(block=8)+disk",
    "heads": f"{SMALL['expected'][:-1]}, heads={HEADS!r})",
}
IN_PIECES = ("chunked prefill", "second turn", "crop, go on")  # nothing is seen in full at once
GUESSED = ("prompt lookup", "assistant")  # all may be guessed right: one pass, nothing stored
# of each of these, a cell of architecture and call has one: placement meets neither of the two
ALTERNATIVES = [
    ("host", "disk", "int4+host"),
    ("sinks+int8", "long window", "long sinks"),
    (*CHOOSING, "snapkv+int4", "expected+int8+host", "keydiff+disk", "heads"),
]


@dataclass(frozen=True)
class Cell:
    """One square of the table."""

    architecture: str
    call: str
    strategy: str

    def __str__(self) -> str:
        return f"{self.architecture} / {self.call} / {self.strategy}"

    @property
    def command(self) -> str:
        """Runs this cell alone."""
        return f'python -m kvplug.testing.matrix --cell "{self}"'


@dataclass(frozen=True)
class Result:
    """What came of a cell, and why."""

    cell: Cell
    outcome: str
    reason: str = ""
    seconds: float = 0.0


def cells() -> Iterator[Cell]:
    """The whole table: all strategies but one of each alternative, in turn."""
    for a, architecture in enumerate(ARCHITECTURES):
        for c, call in enumerate(CALLS):
            left_out = {
                name
                for names in ALTERNATIVES
                for i, name in enumerate(names)
                if i != (a + c) % len(names)
            }
            for strategy in STRATEGIES:
                if strategy not in left_out:
                    yield Cell(architecture, call, strategy)


def a_slice(seed: str, count: int) -> list[Cell]:
    """`count` cells, the same for the same seed; each architecture at most once until all were."""
    draw = random.Random(seed)
    rest = list(cells())
    draw.shuffle(rest)
    order = {name: 0 for name in ARCHITECTURES}
    keyed = []
    for cell in rest:
        keyed.append((order[cell.architecture], len(keyed), cell))
        order[cell.architecture] += 1
    return [cell for *_, cell in sorted(keyed, key=lambda x: x[:2])[:count]]


class Row:
    """The cells of one architecture: its model is built once, and each call's own answer."""

    def __init__(self, architecture: str) -> None:
        self.name = architecture
        self.absent: str | None = None
        self.expected: dict[str, Any] = {}  # call -> Run, or the reason for n/a
        try:
            self.model = make(architecture)
        except Absent as e:
            self.absent = str(e)
            return
        self.caller = Caller(architecture, ARCHITECTURES[architecture], self.model)

    def run(self, cell: Cell) -> Result:
        """The outcome of one cell."""
        start = time.perf_counter()
        if self.absent:
            return Result(cell, "n/a", self.absent)
        with tempfile.TemporaryDirectory() as folder:
            outcome, reason = self._outcome(cell, folder)
        reason = reason.replace(str(Path(folder, HEADS)), HEADS)
        return Result(cell, outcome, reason, round(time.perf_counter() - start, 3))

    def _wanted(self, call: str) -> Any:
        """What `DynamicCache` gives, or why it cannot."""
        if call not in self.expected:
            self.caller.spec, self.caller.before = None, lambda: None
            try:
                self.expected[call] = CALLS[call](self.caller)
            except NoSuchCall as e:
                self.expected[call] = str(e)
            except Exception as e:
                self.expected[call] = f"transformers itself: {type(e).__name__}: {first_line(e)}"
        return self.expected[call]

    def _outcome(self, cell: Cell, folder: str) -> tuple[str, str]:
        wanted = self._wanted(cell.call)
        if isinstance(wanted, str):
            return "n/a", wanted
        padding = None
        if cell.call == "left-padded batch" and not self.caller.architecture.source:
            padding = torch.tensor([max(ROWS) - n for n in ROWS])
        shadow = Shadow(self.model, padding)

        def before() -> None:
            shadow.forwards = 0

        self.caller.before = before
        try:
            self.caller.spec = self._spec(cell.strategy, folder)
            with shadow:
                got = CALLS[cell.call](self.caller)
            return self._judge(cell, got, wanted, shadow)
        except Wrong as e:
            return "wrong", str(e)
        except KvplugError as e:
            if shadow.forwards and not isinstance(e, Unseen):  # which only attention can tell
                return (
                    "crashed",
                    f"refused after the model ran: {type(e).__name__}: {first_line(e)}",
                )
            return "refused", first_line(e)
        except Exception as e:
            return "crashed", f"{type(e).__name__}: {first_line(e)} ({where(e)})"

    def _spec(self, name: str, folder: str) -> str:
        """A strategy as it is run; budgets of heads are of this very model."""
        spec = STRATEGIES[name]
        if HEADS not in spec:
            return spec
        file = str(Path(folder, HEADS))
        calibrated(self.model.config, file)
        return spec.replace(HEADS, file)

    def _judge(self, cell: Cell, got: Run, wanted: Run, shadow: Shadow) -> tuple[str, str]:
        strategy = parse(STRATEGIES[cell.strategy])
        whole = kept_whole(strategy.retention, LENGTH)
        if not shadow.contents_checked and cell.strategy != "static":
            raise Wrong("no layer of ours was ever updated")
        if cell.call not in GUESSED:
            if not strategy.lossless and not (shadow.encoded or shadow.dropped):
                raise Wrong("nothing was ever encoded")
            if not whole and not shadow.dropped:
                raise Wrong("nothing was ever dropped")
        if cell.call in ("bfloat16", "float16"):
            if strategy.lossless and whole:
                check_as_near(got, wanted, self._best())
            else:
                check_first(got, wanted, 0.05)
        elif strategy.lossless and whole:
            check_equal(got, wanted)
        elif got.scores is None and cell.call not in IN_PIECES:
            check_first(got, wanted)
        if cell.call == "greedy" and strategy.retention.first:
            source = self.caller.inputs(prompt(17)) if self.caller.architecture.source else None
            check_rotation(self.model, STRATEGIES[cell.strategy], source)
        # blocks go as wholes, and where padding is in one its tokens are others than alone
        by_block = isinstance(strategy.retention, Scored) and not strategy.placement.on_device
        if cell.call == "left-padded batch" and strategy.lossless and not (whole or by_block):
            self._check_alone(got)
        if strategy.lossless and whole:
            return "exact", ""
        return "bound", ""

    def _best(self) -> Run:
        """The text of the low-precision calls in float32."""
        if "float32" not in self.expected:
            spec, self.caller.spec = self.caller.spec, None
            self.expected["float32"] = in_dtype(self.caller, torch.float32)
            self.caller.spec = spec
        return self.expected["float32"]

    def _check_alone(self, got: Run) -> None:
        """Rows of a padded batch are as alone, where they are so with `DynamicCache`."""
        if self.caller.architecture.source:
            return
        spec = self.caller.spec
        if "alone" not in self.expected:
            self.caller.spec = None
            self.expected["alone"] = alone(self.caller)
            self.caller.spec = spec
        wanted = self.expected["left-padded batch"]
        for i, (ours, theirs) in enumerate(
            zip(alone(self.caller), self.expected["alone"], strict=True)
        ):
            try:
                check_equal(one_row(wanted, i), theirs)
            except Wrong:
                continue  # the model itself sees padding
            try:
                check_equal(one_row(got, i), ours)
            except Wrong as e:
                raise Wrong(f"row {i} of a padded batch is not as alone: {e}") from None


def one_row(run: Run, i: int) -> Run:
    """Row i of a run, as a run of its own."""
    return Run(run.sequences[i : i + 1], tuple(x[i : i + 1] for x in run.logits))


def first_line(e: BaseException) -> str:
    """An error's text in one line."""
    return " ".join(str(e).split())[:300]


def where(e: BaseException) -> str:
    """The innermost line of kvplug or transformers that an error came through."""
    frames = [f for f in traceback.extract_tb(e.__traceback__) if "/torch/" not in f.filename]
    last = frames[-1]
    return f"{'/'.join(Path(last.filename).parts[-2:])}:{last.lineno}"


def quiet() -> None:
    """One thread, since the models are tiny; nothing but the table is printed: in this process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(logging.CRITICAL)
    logging.getLogger("kvplug").setLevel(logging.ERROR)


def run_row(cells_of_one: list[Cell]) -> list[Result]:
    """Cells of one architecture, in a process of its own kind."""
    quiet()
    row = Row(cells_of_one[0].architecture)
    return [row.run(cell) for cell in cells_of_one]


def run(chosen: Iterable[Cell], processes: int, progress: Any = None) -> list[Result]:
    """All results, in the order of the cells; architectures are shared out to processes."""
    rows: dict[str, list[Cell]] = {}
    for cell in chosen:
        rows.setdefault(cell.architecture, []).append(cell)
    results: dict[Cell, Result] = {}
    # spawned: a fork of a process with running threads may wait for ever
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for done in as_completed([pool.submit(run_row, x) for x in rows.values()]):
            for result in done.result():
                results[result.cell] = result
            if progress:
                progress(done.result())
    return [results[cell] for row in rows.values() for cell in row]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 1 where a cell crashed or is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m kvplug.testing.matrix", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--cell", help='one: "architecture / call / strategy"')
    parser.add_argument("--architecture", action="append", help="only rows whose name holds this")
    parser.add_argument("--call", action="append", choices=CALLS, help="only this call")
    parser.add_argument("--strategy", action="append", choices=STRATEGIES, help="only this one")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write every cell here")
    parser.add_argument("--write", type=Path, help="write the document here")
    options = parser.parse_args(arguments)
    if options.cell:
        cell = Cell(*(x.strip() for x in options.cell.split(" / ")))
        result = Row(cell.architecture).run(cell)
        print(f"{result.outcome}  {cell}  {result.reason}")
        return int(result.outcome in ("crashed", "wrong"))
    chosen = [
        cell
        for cell in cells()
        if (not options.architecture or any(x in cell.architecture for x in options.architecture))
        and (not options.call or cell.call in options.call)
        and (not options.strategy or cell.strategy in options.strategy)
    ]
    start = time.perf_counter()

    def progress(results: list[Result]) -> None:
        tally = counts(results)
        print(
            f"{time.perf_counter() - start:6.0f} s  {results[0].cell.architecture}: "
            + ", ".join(f"{n} {name}" for name, n in tally.items() if n),
            flush=True,
        )
        for r in results:
            if r.outcome in ("crashed", "wrong"):
                print(f"    {r.outcome}: {r.cell}: {r.reason}", flush=True)

    results = run(chosen, options.processes, progress)
    seconds = time.perf_counter() - start
    print(f"{len(results)} cells in {seconds:.0f} s: {counts(results)}")
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in results], indent=0) + "\n")
    if options.write:
        from .compatibility import document

        options.write.write_text(document(results, seconds))
    return int(any(r.outcome in ("crashed", "wrong") for r in results))


def counts(results: list[Result]) -> dict[str, int]:
    """Cells by outcome."""
    return {name: sum(r.outcome == name for r in results) for name in OUTCOMES}


if __name__ == "__main__":
    quiet()
    sys.exit(main())
