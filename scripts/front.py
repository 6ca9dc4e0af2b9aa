"""Write `kvplug/front.json`, what `auto` knows of drift, from a result folder of `evals`.

usage: python scripts/front.py FOLDER     (of --suite drift, pareto or quick)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import kvplug  # noqa: E402
from evals.report.runs import read  # noqa: E402
from kvplug.strategy import ALLOWED  # noqa: E402

SUITES = ("drift", "pareto", "quick")
FRONT = ROOT / "kvplug" / "front.json"


def front(folder: Path) -> dict:
    """The KL of each codec in `folder` that loses less than the most that can be allowed."""
    codecs, (_, _, rows) = kvplug.available()["codec"], read(folder)
    of_codecs = [
        row
        for row in rows
        if row["suite"] in SUITES and row["metric"] == "kl" and row["case"] is None
        and row["strategy"] in codecs and 0 < row["value"] <= max(ALLOWED.values())
    ]  # fmt: skip
    kl = {row["strategy"]: float(f"{row['value']:.2g}") for row in of_codecs}
    names = ("model", "dataset", "context", "note", "transformers", "torch", "hardware")
    source = {name: of_codecs[0][name] for name in names}
    return {"kl": dict(sorted(kl.items(), key=lambda x: x[1])), "measured": source}


if __name__ == "__main__":
    FRONT.write_text(json.dumps(front(Path(sys.argv[1])), indent=1) + "\n", encoding="utf-8")
