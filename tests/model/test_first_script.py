"""README's first script runs as it is pasted, but for shorter answers, on the packaged model."""

import re
import subprocess
import sys
from pathlib import Path

from kvplug.compat import CACHE_ARGUMENT

ROOT = Path(__file__).parents[2]
SCRIPT = re.compile(r"<!-- the first script -->\n```python\n(.*?)```", re.DOTALL)


def test_the_first_script_runs_as_pasted():
    (script,) = SCRIPT.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(script.splitlines()) <= 14
    script = script.replace("out.cache", f"out.{CACHE_ARGUMENT}")  # as its comment says
    script = script.replace('"max_new_tokens": 40', '"max_new_tokens": 8')  # sooner
    command = [sys.executable, "-"]
    done = subprocess.run(
        command, input=script, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    told = re.findall(r"^(\S+): ([\d,]+) bytes: (.*)", done.stdout, re.MULTILINE)
    names, sizes, answers = zip(*told, strict=True)
    assert names == ("growing", "int8", "int4")
    growing, int8, int4 = (int(size.replace(",", "")) for size in sizes)
    assert int4 < int8 < 0.4 * growing
    assert all(re.search(r"[a-z]{3}", answer) for answer in answers)
