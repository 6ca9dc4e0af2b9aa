"""Result folders written by hand: rows of suites without a model, and bait for a browser."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from evals.rows.schema import at, failed, measured

if TYPE_CHECKING:
    from pathlib import Path

EXACT = "transformers:dynamic"
EVIL = "<script>alert('name')</script>"
ERROR = "no card </script><img src=x onerror=alert('error')> & 100 % {{ 7 * 7 }}"
SOURCE: dict[str, Any] = {
    "git": "abc1234",
    "kvplug": "0.1.0",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "model": "tiny sha256:0",
    "dataset": "book.txt sha256:1",
    "hardware": "CPU, 2 cores",
    "dtype": "float32",
    "threads": 1,
}
STRATEGIES = (EXACT, "growing", "host", "int4", EVIL)
FAR = 6000


def rows(suite: str) -> list[dict[str, Any]]:
    return [{"batch": 1, "context": FAR, "case": None} | row for row in SUITES[suite]()]


def folder(out: Path, suite: str, rows: list[dict[str, Any]], **changes: Any) -> Path:
    """Write a result folder."""
    path = out / suite
    path.mkdir(parents=True)
    config = {"suite": suite, "strategies": STRATEGIES, "dtype": "float32", "batch": [1]}
    config |= {"context": [512, FAR], "windows": 1, "window": 512, "chunk": 64, "skip": 64}
    config |= {"decode_steps": 3, "warmup": 1, "repeats": 1, "new_tokens": 4, "trials": 2}
    env = {name: SOURCE[name] for name in ("git", "hardware", "threads", "model", "dataset")}
    env |= {"versions": {"torch": "2.13.0"}, "placement": "cpu", "system": "Linux", "seed": 0}
    whole = [
        {"suite": suite, "task": suite, "done": True, "run": f"{suite}key", "time": "2026-01-01"}
        | {"spec": row["strategy"], **SOURCE}
        | row
        for row in rows
    ]
    (path / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    (path / "env.json").write_text(json.dumps(env), encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in whole)
    (path / "rows.jsonl").write_text(lines, encoding="utf-8")
    return path


def named(name: str, *measurements: dict[str, Any], **place: Any) -> list[dict[str, Any]]:
    return [at(one, **place) | {"strategy": name} for one in measurements]


def decode() -> list[dict[str, Any]]:
    """int4 is 2.3 times as fast far out; growing differs by less than the reference from itself."""
    made = named(EXACT, measured("decode", 20.0), context=0)
    times = {EXACT: 46.0, "control:same": 47.0, "growing": 45.5, "host": 45.8, "int4": 20.0}
    for context in (512, FAR):
        for name, far in times.items():
            value = far if context == FAR else 20.0
            samples = measured("decode", value - 1, value, value + 1)
            made += named(name, samples, context=context)
            ratio = measured("speedup", times[EXACT] / far)
            made += named(name, ratio, context=context) if context == FAR else []
    return made + named(EVIL, failed(RuntimeError(ERROR)), context=FAR)


def memory() -> list[dict[str, Any]]:
    held = {EXACT: 34e6, "growing": 37.4e6, "host": 34e6, "int4": 10e6}
    return [
        row
        for context in (512, FAR)
        for name, value in held.items()
        for row in named(
            name,
            measured("bytes_held", value * context / FAR),
            measured("peak_decode", value, note="VmHWM"),
            context=context,
        )
    ]


def drift() -> list[dict[str, Any]]:
    made = []
    found = {EXACT: 0.0, "growing": 2e-10, "host": 0.0, "int4": 0.005, "control:broken": 4.0}
    for name, kl in found.items():
        made += named(name, measured("kl", kl), measured("perplexity", 11.0))
        if not name.startswith("control:"):
            made += named(name, measured("kl", kl / 2), case="64-128")
            made += named(name, measured("kl", kl * 2), case="128-512")
    return made


def retrieval() -> list[dict[str, Any]]:
    return [
        row
        for name, share in {EXACT: 1.0, "int4": 0.75, EVIL: 0.0}.items()
        for length in (512, 1024)
        for depth in (0.0, 0.5, 1.0)
        for row in named(
            name,
            measured("retrieval", share, share),
            context=length,
            case={"length": length, "depth": depth, "keys": 1},
        )
    ]


SUITES = {"decode": decode, "memory": memory, "drift": drift, "retrieval": retrieval}
