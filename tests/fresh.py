"""A Python that has transformers and no kvplug yet: forked from one that waits, seconds sooner.

The standard library's fork server imports what takes long once; each child is as a new process
that has done the same. What a process does before it imports anything needs a real one.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PRELOADED = [
    "torch",
    "transformers.generation.utils",
    "transformers.generation.candidate_generator",
    "transformers.models.llama.modeling_llama",
]


def fresh(
    code: str,
    *,
    path: Iterable[Path] = (),
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    seconds: int = 180,
    expected: int | None = 0,
) -> subprocess.CompletedProcess[str]:
    """What became of `code`, as `subprocess.run` says it.

    Args:
        code: as after `python -c`.
        path: before everything else in `sys.path`, and of processes that it starts.
        env: beside this process's own environment.
        cwd: where it runs.
        seconds: after which it has failed.
        expected: exit status; None: any.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        import pytest  # not in the child, which is to be as its user's

        pytest.skip("this system does not fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        given = code, [str(x) for x in path], dict(os.environ | (env or {})), cwd, folder
        child = context.Process(target=_run, args=given)
        child.start()
        child.join(seconds)
        ended = child.exitcode is not None
        if not ended:
            child.kill()
            child.join()
        out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
    assert ended, f"no end after {seconds} s: {out + err}"
    assert expected is None or child.exitcode == expected, out + err
    return subprocess.CompletedProcess(code, child.exitcode, out, err)


def _run(code: str, path: list[str], env: dict[str, str], cwd: Path | None, folder: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    os.environ.clear()
    os.environ.update(env)
    if path:
        beside = [*path, *filter(None, [env.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(beside)
        sys.path[:0] = path
    if cwd is not None:
        os.chdir(cwd)
    assert "kvplug" not in sys.modules
    sys.argv = ["-c"]
    exec(compile(code, "<fresh>", "exec"), {"__name__": "__main__"})
