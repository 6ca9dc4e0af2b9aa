"""kvpress (github.com/NVIDIA/kvpress) behind a pipe: it needs transformers < 5.3, kvplug a newer.

It compresses a prompt in hooks of the model's layers and is no cache; so it is given the texts and
questions of suites `retrieval` and `unseen`, and says what it found. The interpreter of an
environment of its own stands in `EVALS_KVPRESS`; both run the same weights, in float32.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VARIABLE = "EVALS_KVPRESS"
WORKER = Path(__file__).with_name("_kvpress_worker.py")


def answers(
    press: str, kept: int, model: PreTrainedModel, prompt: list[int], asks: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return what a press says of a prompt and what comes behind it, as the worker explains.

    Raises RuntimeError where there is no such environment, or it fails.
    """
    worker = started(press, kept, model)
    try:
        worker.stdin.write(json.dumps({"prompt": prompt, "asks": asks}) + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        worker.wait()
        raise RuntimeError(f"{press} of kvpress has ended with {worker.returncode}: see stderr")
    return json.loads(line)


@functools.cache
def started(press: str, kept: int, model: PreTrainedModel) -> subprocess.Popen:
    """Return the process of one press, which reads the model that `saved` has written."""
    python = os.environ.get(VARIABLE)
    if not python or not Path(python).exists():
        raise RuntimeError(
            f"{VARIABLE}={python or ''}: kvpress needs transformers < 5.3, an environment of its "
            "own: python -m venv kvpress && kvpress/bin/pip install torch kvpress==0.5.5, then "
            f"{VARIABLE}=$PWD/kvpress/bin/python"
        )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    clean = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    worker = subprocess.Popen([python, str(WORKER)], env=clean, **pipes)
    atexit.register(ended, worker)
    said = {"model": saved(model), "press": press, "kept": kept}
    worker.stdin.write(json.dumps(said) + "\n")
    return worker


def ended(worker: subprocess.Popen) -> None:
    """End a process and close its pipes."""
    worker.kill()
    worker.communicate()


@functools.cache
def saved(model: PreTrainedModel) -> str:
    """Return a folder with a model, until this process ends."""
    folder = tempfile.mkdtemp(prefix="kvpress-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model.save_pretrained(folder)
    return folder
