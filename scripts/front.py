"""Write `kvplug/front.json`, what `auto` knows of losses, from result folders of `evals`.

usage: python scripts/front.py FOLDER ...

A folder of --suite pareto gives bits and drift of codecs; those of retrieval, unseen and stream
give what is lost by methods that let tokens go, several of one suite together. What no folder gives
stays as it is.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import kvplug  # noqa: E402
from evals.report.runs import read  # noqa: E402
from evals.rows.tables import interval  # noqa: E402
from evals.setup.contenders import EXACT  # noqa: E402
from evals.suites import retrieval  # noqa: E402
from kvplug.strategy import ALLOWED  # noqa: E402

# by use: the suite, its metric, the method that serves it, and whether heads have own budgets;
# None: both count
METHODS = {
    "prompt": ("retrieval", "retrieval_asked", "snapkv", False),
    "prefix": ("unseen", "retrieval", "expected", True),
    "stream": ("stream", "kl", "expected", None),
}
FRONT = ROOT / "kvplug" / "front.json"


def sections(folder: Path) -> dict[str, Any]:
    """What a folder gives: `kl`, `bits` and `measured`, or some of `kept` by use."""
    _, _, rows = read(folder)
    if rows[0]["suite"] == "pareto":
        return of_codecs(rows)
    made = {use: of_methods(rows, *how) for use, how in METHODS.items()}
    return {"kept": {use: found for use, found in made.items() if found}}


def together(folders: list[Path]) -> dict[str, Any]:
    """What folders give; of a use all that they have measured for it."""
    found: dict[str, Any] = {"kept": {}}
    for folder in folders:
        new = sections(folder)
        for use, kept in new.pop("kept", {}).items():
            options = found["kept"].get(use, {"options": []})["options"] + kept["options"]
            found["kept"][use] = kept | {"options": sorted(options, key=order)}
        found |= new
    return found


def order(option: dict[str, Any]) -> tuple:
    """By how much is kept, the largest first; of one share without a codec first, and before others
    with budgets of heads.
    """
    strategy = kvplug.parse(option["spec"].format(budget=option["of"], calibration="any"))
    return -option["share"], not strategy.lossless, strategy.retention.heads is None


def of_codecs(rows: list[dict]) -> dict[str, Any]:
    """KL and bits of each codec that loses less than the most that can be allowed."""
    bits = {row["strategy"]: round(row["value"], 2) for row in rows if row["metric"] == "bits"}
    codecs = kvplug.available()["codec"]
    rows = [
        row
        for row in rows
        if row["metric"] == "kl" and row["case"] is None
        and row["strategy"] in codecs and 0 < row["value"] <= max(ALLOWED.values())
    ]  # fmt: skip
    kl = {row["strategy"]: float(f"{row['value']:.2g}") for row in rows}
    kl = dict(sorted(kl.items(), key=lambda x: x[1]))
    return {"kl": kl, "bits": {name: bits[name] for name in kl}, "measured": source(rows[0])}


def of_methods(
    rows: list[dict], suite: str, metric: str, method: str, calibrated: bool | None
) -> dict[str, Any] | None:
    """What a method lost at each share of tokens that it kept, in `order`.

    calibrated: whether with budgets of heads, of whatever file; None: with and without.
    """
    if rows[0]["suite"] != suite:
        return None
    rows = [row for row in retrieval.pooled(rows) if row["metric"] == metric]
    if metric == "kl":  # of the last positions: those before have lost little, or nothing yet
        last = max((row["case"] for row in rows if row["case"]), key=lambda x: int(x.split("-")[0]))
        rows = [row for row in rows if row["case"] == last]
    exact = {row["context"]: row["value"] for row in rows if row["strategy"] == EXACT}
    options = []
    for row in rows:
        if ":" in row["strategy"]:  # not of ours
            continue
        retention = kvplug.parse(row["strategy"]).retention
        if retention.name != method or calibrated not in (None, retention.heads is not None):
            continue
        spec = row["strategy"].replace(";", ", ")
        spec = re.sub(r"budget=\d+", "budget={budget}", spec)
        spec = re.sub(r"heads='[^']*'", "heads={calibration!r}", spec)
        share = retention.budget / row["context"]
        found = {"spec": spec, "share": share, "of": row["context"]}
        if metric == "kl":
            found["kl"] = float(f"{row['value']:.2g}")
        else:
            shares = row["value"], *interval(row["value"], row["n"])
            found["found"] = [round(x, 3) for x in shares]
            found["exact"] = round(exact[row["context"]], 3)
        options.append(found)
    if not options:
        return None
    return {"options": sorted(options, key=order), "measured": source(rows[0])}


def source(row: dict) -> dict[str, Any]:
    """Where a row was measured."""
    names = ("model", "dataset", "context", "note", "transformers", "torch", "hardware")
    return {name: row[name] for name in names}


if __name__ == "__main__":
    front = json.loads(FRONT.read_text(encoding="utf-8"))
    new = together([Path(folder) for folder in sys.argv[1:]])
    front |= new | {"kept": front.get("kept", {}) | new["kept"]}
    FRONT.write_text(json.dumps(front, indent=1) + "\n", encoding="utf-8")
