"""Plant a defect in a copy of the tree, run the tests that should see it, and say whether they did.

    python scripts/mutate.py            all of them, one after the other: some ten minutes
    python scripts/mutate.py crop beam  those with one of these words in their name
    python scripts/mutate.py --list     whether all can still be planted

Ends with 1 where one survives, and with 2 where nothing was learned: the text of one is gone, or
the tests fail without any.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from defects import DEFECTS, Defect

ROOT = Path(__file__).resolve().parents[1]
JUNK = (".git", ".venv", "docs", "build", "*.egg-info", ".pytest_cache", ".ruff_cache")
SECONDS = 300  # a defect may make a loop endless


def missing(defects: list[Defect]) -> list[str]:
    """Defects whose text does not stand exactly once in its file, and why."""
    said = []
    for x in defects:
        path = ROOT / x.file
        n = path.read_text().count(x.old) if path.exists() else None
        if n != 1:
            said.append(f"{x.name}: {x.file} " + ("is gone" if n is None else f"has it {n} times"))
    return said


def pytest(tree: Path, arguments: tuple[str, ...], env: dict[str, str]) -> tuple[int | None, str]:
    """Exit status and last lines; None where it has not ended in time."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree)} | env,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return None, f"no end after {SECONDS} s"
    lines = (done.stdout + done.stderr).splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, "\n".join(failed or lines[-15:])


def plant(tree: Path, defect: Defect) -> tuple[int | None, str]:
    """What the tests say of a tree with the defect; the tree is as before when it returns."""
    path = tree / defect.file
    text = path.read_text()
    stamp = path.stat()
    path.write_text(text.replace(defect.old, defect.new))
    try:
        return pytest(tree, defect.tests, defect.env)
    finally:
        path.write_text(text)
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # what is compiled stays valid


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only defects with one of them in their name")
    parser.add_argument("--list", action="store_true", help="name them, plant none")
    options = parser.parse_args()
    words = [word.lower() for word in options.words]
    defects = [x for x in DEFECTS if not words or any(w in x.name.lower() for w in words)]
    if gone := missing(defects):
        print(*gone, sep="\n", file=sys.stderr)
        return 2
    if options.list:
        print(*(f"{x.file:40s} {x.name}" for x in defects), sep="\n")
        return 0
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="kvplug-mutate-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*JUNK))
        sound: set[tuple] = set()
        for x in defects:
            start, selection = time.monotonic(), (x.tests, *x.env.items())
            if selection not in sound:  # else red would mean nothing
                status, said = pytest(tree, x.tests, x.env)
                if status != 0:
                    print(
                        f"without any defect: pytest {' '.join(x.tests)}: {said}", file=sys.stderr
                    )
                    return 2
                sound.add(selection)
            status, said = plant(tree, x)
            if status not in (None, 0, 1):
                print(f"{x.name}: pytest ended with {status}: {said}", file=sys.stderr)
                return 2
            survivors += status == 0
            what = "SURVIVED" if status == 0 else "caught"
            print(f"{what:8s} {time.monotonic() - start:4.0f} s  {x.name}", flush=True)
            print(f"                 {said.splitlines()[0]}", flush=True)
    print(f"{len(defects) - survivors} of {len(defects)} caught")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
