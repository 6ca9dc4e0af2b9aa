"""Many `generate` calls in one process: what they leave behind.

    python scripts/long_life.py --generates 1000

Strategies are mixed, so are prompt lengths and batches; every tenth call is stopped by an exception
in the middle. Prints one line of JSON: what the process holds after the calls and how much more
that is than after the warm-up. Exits with 1 where memory grew by more than 5 MB, or anything else
grew at all. Needs Linux, whose /proc it reads.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from kvplug.testing import tiny_llama
from kvplug.testing.tools import prompt

if TYPE_CHECKING:
    from collections.abc import Iterator

STRATEGIES = (
    "growing", "kvplug:static", "int8(block=8)", "int4(block=16, tail=16)", "window(length=20)",
    "sinks(sinks=2, window=30)", "sinks(sinks=2, window=30)+int8(block=8)", "host+exact(block=8)",
    "disk+exact(block=8)", "int2(block=8)+disk", "kvplug:static+int8(block=8)",
    "int4(block=8)+reference",
)  # fmt: skip
GROWTH = 5_000_000  # bytes of memory that may be the allocator's


class Stopped(Exception):
    """Raised in the middle of every tenth call."""


def live(generates: int, warmup: int) -> dict[str, dict[str, int]]:
    """Holdings after the warm-up and after `generates` more calls."""
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_llama()
        for i in range(warmup):
            call(model, i, folder)
        before = holdings(folder)
        for i in range(generates):
            call(model, i, folder)
        return {"before": before, "after": holdings(folder)}


def call(model: object, i: int, folder: str) -> None:
    """The i-th call."""
    strategy = STRATEGIES[i % len(STRATEGIES)].replace("disk", f"disk(folder={folder!r})")
    criteria = [_stop] if i % 10 == 9 else []
    ids = prompt(17 + 37 * i % 180, batch=1 + i % 3, seed=i % 50)
    settings = {"max_new_tokens": 4 + i % 9, "do_sample": i % 2 == 0}
    with contextlib.suppress(Stopped):
        model.generate(ids, cache_implementation=strategy, stopping_criteria=criteria, **settings)


def _stop(ids: object, scores: object) -> bool:
    raise Stopped


def holdings(folder: str) -> dict[str, int]:
    """What the process holds, in bytes and in numbers."""
    gc.collect()
    status = dict(line.split(":", 1) for line in _lines("/proc/self/status"))
    kilobytes = {name: int(status[name].split()[0]) for name in ("VmRSS", "VmPin", "VmLck")}
    return {
        "memory": 1024 * kilobytes["VmRSS"],
        "pinned": 1024 * (kilobytes["VmPin"] + kilobytes["VmLck"]),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "files": len(list(Path(folder).iterdir())),
        "mapped files": sum(folder in line for line in _lines("/proc/self/maps")),
    }


def _lines(path: str) -> Iterator[str]:
    yield from Path(path).read_text().splitlines()


def grown(result: dict[str, dict[str, int]]) -> dict[str, int]:
    """What is more after than before, memory only where it is more than the allocator's."""
    more = {name: n - result["before"][name] for name, n in result["after"].items()}
    return {name: n for name, n in more.items() if n > (GROWTH if name == "memory" else 0)}


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--generates", type=int, default=1000)
    parser.add_argument("--warmup", type=int, default=120, help="ten calls of each strategy")
    args = parser.parse_args()
    result = live(args.generates, args.warmup)
    print(json.dumps(vars(args) | result | {"grown": grown(result)}))
    return 1 if grown(result) else 0


if __name__ == "__main__":
    sys.exit(main())
