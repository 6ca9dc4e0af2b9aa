"""What the tests' runs measure on, and how they start; as a script, such a run, to be killed or
shared.

python tiny_run.py BOOK OUT             one run
python tiny_run.py BOOK OUT KILLS SEED  runs killed at random moments and taken up again
"""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = ["the", "cache", "keeps", "every", "key", "and", "value", "attention", "asks", "for"]
READ = {"cpu": 1 << 22}  # bytes, to time the machine's memory with
STRATEGIES = ("transformers:dynamic", "growing", "transformers:static", "kvplug:static")


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def text() -> str:
    words = random.Random(0)
    lines = (" ".join(words.choices(WORDS, k=9)) for _ in range(60))
    return "\n".join(lines)


class Bytes:
    """Stand in for a tokenizer: one token per byte."""

    def __call__(self, text: str, **_: object) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.tensor([[byte % 128 for byte in text.encode()]]))

    def batch_decode(self, ids: torch.Tensor) -> list[str]:
        return [bytes(row).decode() for row in ids.tolist()]


class Words:
    """Stand in for a tokenizer: one token per word or other character."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def __call__(self, text: str, **_: object) -> SimpleNamespace:
        parts = re.findall(r" ?\w+|\W", text)
        ids = [self.known.setdefault(part.strip(" ") or part, len(self.known)) for part in parts]
        return SimpleNamespace(input_ids=torch.tensor([ids]))

    def text(self, ids: list[int]) -> str:
        names = {number: part for part, number in self.known.items()}
        return " ".join(names[i] for i in ids)

    def batch_decode(self, ids: torch.Tensor) -> list[str]:
        return [" ".join(map(str, row)) for row in ids.tolist()]


def loaded(lm: LlamaForCausalLM) -> tuple[Any, Any, str]:
    return lm, Bytes(), "tiny sha256:0"


def config(book: str, **changes: Any) -> Any:
    from evals.setup.config import Config

    asked = {
        "dataset": book,
        "strategies": ("transformers:dynamic",),
        "context": (144,),
        "decode_steps": 4,
        "warmup": 1,
        "repeats": 2,
        "new_tokens": 6,
        "windows": 2,
        "window": 192,
        "chunk": 16,
        "skip": 20,
        "threads": 1,
    }
    return Config(**asked | changes)


def measured(config: Any, out: Path, console: Any, ok: bool = True) -> tuple[Path, list[Any]]:
    """Run; return the result folder, the only one, and its rows."""
    from evals.report.runs import read
    from evals.run import run

    assert run(config, out, console) is ok, console.file.getvalue()
    (folder,) = out.iterdir()
    return folder, read(folder)[2]


def figures(folder: Path) -> list[dict[str, Any]]:
    """All that the rows say but when."""
    from evals.report.runs import read

    rows = read(folder)[2]
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


def one_run(book: str, out: Path, windows: int = 2) -> None:
    from rich.console import Console

    import evals.measure.machine
    import evals.setup.model
    from evals.run import run

    evals.measure.machine.READ = READ
    evals.setup.model.load = lambda name, dtype: loaded(model())
    asked = config(book, suite="drift", strategies=STRATEGIES, windows=windows)
    run(asked, out, Console(quiet=True))


def child(book: str, out: Path) -> int:
    """Start a run in a fork, which spares it the imports; return its process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        one_run(book, out, windows=1)
        code = 0
    finally:
        os._exit(code)


def killed(book: str, out: Path, kills: int, seed: int) -> None:
    """Kill runs at random moments and print how many rows each had left; a folder whose run ends
    before its moment is left as it is.
    """
    import evals.run

    evals.run.render = lambda *_: True  # what is drawn of the rows is not what they are
    os.environ["NUMBA_THREADING_LAYER"] = "workqueue"  # numba's OpenMP refuses to be forked
    from kvplug.kernels.numba import process

    one_run(book, out / "first", windows=1)  # whatever is imported late is there for all forks
    process.compiled.cache_clear()  # forks take the kernel from disk: none compiles its own
    start = time.monotonic()
    os.waitpid(child(book, out / "second"), 0)
    whole, draw, number = time.monotonic() - start, random.Random(seed), 0
    while kills:
        pid = child(book, out / str(number))
        time.sleep(draw.uniform(0, whole))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            kills -= 1
            rows = list((out / str(number)).glob("*/rows.jsonl"))
            print(rows[0].read_text().count("\n") if rows else 0)
        else:
            assert status == 0
            number += 1


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    torch.set_num_threads(1)
    book, out, *how = sys.argv[1:]
    if how:
        killed(book, Path(out), *map(int, how))
    else:
        one_run(book, Path(out))
