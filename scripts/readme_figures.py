"""What README.md and pages of docs/ tell of figures, written from committed result folders.

usage: python scripts/readme_figures.py

A block stands between `<!-- figures: NAME -->` and `<!-- end -->`; the function of that name in
`figures` makes what is between. A test runs it and expects no change.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = str(ROOT), str(ROOT / "scripts")

from figures import quality, retention, reuse, speed  # noqa: E402

PAGES = ROOT / "README.md", *(ROOT / "docs" / f"{x}.md" for x in ("auto", "retention", "speed"))
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rewritten(text: str) -> str:
    """Return a text with every block made anew."""
    return BLOCK.sub(lambda m: f"{m[1]}{_made(m[2])}\n{m[3]}", text)


def _made(name: str) -> str:
    (make,) = (getattr(x, name) for x in (quality, retention, reuse, speed) if hasattr(x, name))
    return make()


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rewritten(page.read_text(encoding="utf-8")), encoding="utf-8")
