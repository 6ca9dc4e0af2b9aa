"""`docs/compatibility.md`, written from the results of `kvplug.testing.matrix`."""

from __future__ import annotations

import datetime
import platform
import re
from collections import defaultdict
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
import transformers

from .architectures import ARCHITECTURES
from .calls import CALLS
from .matrix import ALTERNATIVES, OUTCOMES, STRATEGIES, counts

if TYPE_CHECKING:
    from .matrix import Result

_STAGE = r"(?:growing|static|exact|int\d|window|sinks|host|disk)(?:\([^)]*\))?"
SPEC = re.compile(rf"\b{_STAGE}(?:\+{_STAGE})*")  # a strategy, as reasons name it
SYMBOLS = {"exact": "=", "bound": "≈", "refused": "R", "n/a": "·", "crashed": "!", "wrong": "X"}
MEANING = {
    "exact": "the tokens and scores of transformers' `DynamicCache`; of MiniMax, whose own cache "
    "forgets padding and the order of beams, those of the model without a cache",
    "bound": "what is stored is within the codec's own bound of what the model wrote, in the "
    "columns that retention promises, and attention is dense attention over the same content",
    "refused": "an error of kvplug before the model ran, with its reason",
    "n/a": "transformers itself cannot do it, with `DynamicCache`; or there is no such call",
    "crashed": "any other error",
    "wrong": "anything else",
}
BESIDE = """## Beside the table

What takes long, or has one answer for all architectures, is tested once: `flex_attention`,
`torch.compile` of a whole model and a cache sent to another process (tests/test_architectures.py),
two threads with two strategies on one model (tests/test_long_life.py), float64
(tests/test_layer.py), peft adapters switched between calls and weights on CPU and disk
(examples/switch_adapters.py and spread_weights.py, which tests/test_examples.py runs)."""


def document(results: list[Result], seconds: float) -> str:
    """The whole document."""
    notes = Notes(results)
    parts = [
        _head(results, seconds),
        _by_strategy(results),
        _by_architecture(results, notes),
        notes.text("refused", "What is refused", "R"),
        notes.text("n/a", "What transformers itself cannot do, and calls that there are not", ""),
        BESIDE,
        _cells(results),
    ]
    for outcome in ("crashed", "wrong"):
        if any(r.outcome == outcome for r in results):
            parts.insert(1, notes.text(outcome, outcome.capitalize(), ""))
    return "\n\n".join(parts) + "\n"


def _head(results: list[Result], seconds: float) -> str:
    tally = counts(results)
    shares = "\n".join(
        f"| `{SYMBOLS[name]}` | {name} | {n} | {100 * n / len(results):.1f} % | {MEANING[name]} |"
        for name, n in tally.items()
    )
    one_of = "; ".join(", ".join(names) for names in ALTERNATIVES)
    versions = ", ".join(
        f"{name} {value}"
        for name, value in (
            ("kvplug", version("kvplug")),
            ("transformers", transformers.__version__),
            ("torch", torch.__version__),
            ("Python", platform.python_version()),
        )
    )
    return f"""# Compatibility

Every strategy on every kind of architecture in every way to call it: {len(results)} cells, each
found by running it. Models are tiny and random, texts about 30 tokens long, blocks and windows
small enough that these reach every edge; float32 and `sdpa` attention unless the call says
otherwise. Of each of these groups a cell has one strategy in turn: {one_of}.

{versions}; {datetime.date.today().isoformat()}, {seconds / 60:.0f} minutes on {platform.machine()}.

```
python -m kvplug.testing.matrix --write docs/compatibility.md     # writes this file
python -m kvplug.testing.matrix --cell "llama / beams / int4"     # runs one cell
```

| | outcome | cells | share | |
|---|---|---:|---:|---|
{shares}"""


def _by_strategy(results: list[Result]) -> str:
    rows = []
    for name, spec in STRATEGIES.items():
        tally = counts([r for r in results if r.cell.strategy == name])
        rows.append(f"| {name} | `{spec}` | " + " | ".join(str(n or "") for n in tally.values()))
    return "\n".join(
        [
            "## By strategy",
            "",
            "| strategy | as it was run | " + " | ".join(OUTCOMES) + " |",
            "|---|---|" + "---:|" * len(OUTCOMES),
            *(f"{row} |" for row in rows),
        ]
    )


def _by_architecture(results: list[Result], notes: Notes) -> str:
    found: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for r in results:
        found[r.cell.architecture, r.cell.strategy].append(r)
    rows = []
    for architecture in ARCHITECTURES:
        squares = []
        for strategy in STRATEGIES:
            tally = counts(here := found[architecture, strategy])
            square = " ".join(f"{SYMBOLS[x]}{n}" for x, n in tally.items() if n and x != "n/a")
            numbers = sorted({notes.number(r) for r in here if r.outcome == "refused"})
            squares.append(square + "".join(f" <sup>R{n}</sup>" for n in numbers))
        rows.append(f"| {architecture} | " + " | ".join(squares) + " |")
    return "\n".join(
        [
            "## By architecture",
            "",
            f"How many of the {len(CALLS)} calls (`{'`, `'.join(CALLS)}`) came out so; `R` with "
            "the number of its reason below.",
            "",
            "| architecture | " + " | ".join(STRATEGIES) + " |",
            "|---|" + "---|" * len(STRATEGIES),
            *rows,
        ]
    )


def _cells(results: list[Result]) -> str:
    found = {(r.cell.strategy, r.cell.architecture, r.cell.call): r.outcome for r in results}
    parts = ["## Every cell"]
    for strategy in STRATEGIES:
        lines = [
            "| | " + " | ".join(CALLS) + " |",
            "|---|" + ":-:|" * len(CALLS),
        ]
        for architecture in ARCHITECTURES:
            squares = (found.get((strategy, architecture, call)) for call in CALLS)
            lines.append(
                f"| {architecture} | " + " | ".join(SYMBOLS.get(x, "") for x in squares) + " |"
            )
        table = "\n".join(lines)
        parts.append(f"<details><summary>{strategy}</summary>\n\n{table}\n\n</details>")
    return "\n\n".join(parts)


class Notes:
    """Reasons, numbered: those that differ in numbers and in the strategy they name are one."""

    def __init__(self, results: list[Result]) -> None:
        self.cells: dict[tuple[str, str], list[Result]] = defaultdict(list)
        for r in results:
            if r.reason:
                self.cells[self._key(r)].append(r)
        self.numbers: dict[tuple[str, str], int] = {}
        for key in self.cells:
            self.numbers[key] = 1 + sum(other[0] == key[0] for other in self.numbers)

    @staticmethod
    def _key(r: Result) -> tuple[str, str]:
        return r.outcome, re.sub(r"\d+", "#", SPEC.sub("", r.reason))

    def number(self, r: Result) -> int:
        """The number of a result's reason among those of its outcome."""
        return self.numbers[self._key(r)]

    def text(self, outcome: str, title: str, mark: str) -> str:
        """A section: each reason once, and where."""
        lines = [f"## {title}", ""]
        for (kind, _), here in self.cells.items():
            if kind == outcome:
                number = self.number(here[0])
                lines.append(f"{number}. {f'{mark}{number}: ' if mark else ''}{here[0].reason}")
                for field in ("strategy", "call", "architecture"):
                    names = dict.fromkeys(getattr(r.cell, field) for r in here)
                    lines.append(f"   - {field}: {', '.join(names)}")
        return "\n".join(lines) if len(lines) > 2 else f"## {title}\n\nNothing."
