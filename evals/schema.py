"""What a row says. Rows are long: one metric of one strategy each, so that they add up over runs
without reshaping.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np


class Metric(NamedTuple):
    """What is measured, in which unit, which way is better, and over what the spread is."""

    unit: str
    better: Literal["lower", "higher", "zero"]
    doc: str


METRICS = {
    "prefill": Metric("s", "lower", "the whole prompt in one forward, after a short warm-up"),
    "decode": Metric(
        "ms/token", "lower", "one greedy step; median, p20 and p80 over the timed steps"
    ),
    "bytes_held": Metric(
        "B", "lower", "every tensor reachable from the cache after decoding, shared storage once"
    ),
    "peak_prefill": Metric(
        "B", "lower", "most memory during prefill, above what was there before the cache"
    ),
    "peak_decode": Metric(
        "B", "lower", "most memory during decode, above what was there before the cache"
    ),
    "perplexity": Metric(
        "1", "lower", "exp of the mean NLL of the next token, text fed through the cache in chunks"
    ),
    "perplexity_delta": Metric(
        "%", "zero", "perplexity against the exact cache's; moves by luck on short texts"
    ),
    "kl": Metric("nat", "lower", "mean KL(exact || strategy) of the next-token distributions"),
    "top1": Metric("1", "higher", "share of positions where both have the same most likely token"),
    "greedy": Metric(
        "tokens",
        "higher",
        "leading greedy tokens equal to the exact cache's; spread over the batch",
    ),
}


class Row(TypedDict):
    """One line of rows.jsonl."""

    strategy: str  # the row's name, as accepted by --strategies
    spec: str  # the strategy with every default written out; for a rival, its builder
    status: Literal["ok", "failed"]
    error: str | None  # class and message of what stopped this strategy; metric is then null
    metric: str | None  # a key of METRICS
    unit: str | None  # METRICS[metric].unit
    better: str | None  # METRICS[metric].better
    value: (
        float | None
    )  # the median where n > 1; null where it cannot be measured, and `note` says why
    p20: float | None  # 20th percentile of the n samples
    p80: float | None  # 80th percentile
    n: int  # samples
    note: str | None  # how it was measured, where that differs between machines
    stats: dict[str, Any] | None  # the cache's own account: kernels that ran, dense views made
    run: str  # Config.key: the folder's name
    git: str | None  # git describe of kvplug's checkout
    kvplug: str | None  # versions
    torch: str
    transformers: str
    model: str  # name and fingerprint
    dataset: str  # name and fingerprint
    hardware: str  # GPU, or CPU and cores
    dtype: str
    threads: int
    batch: int
    context: int
    time: str  # UTC, ISO 8601, when the row was written


def measured(
    metric: str, *samples: float, note: str | None = None, stats: dict | None = None
) -> dict[str, Any]:
    """Return the measured part of a row. No sample: the figure cannot be had here, and `note` says
    why.
    """
    if not all(math.isfinite(sample) for sample in samples):
        raise FloatingPointError(f"{metric} is not finite: {samples}")
    p20, value, p80 = (
        np.percentile(samples, [20, 50, 80]).tolist() if samples else (None, None, None)
    )
    what = METRICS[metric]
    return {
        "status": "ok",
        "error": None,
        "metric": metric,
        "unit": what.unit,
        "better": what.better,
        "value": value,
        "p20": p20,
        "p80": p80,
        "n": len(samples),
        "note": note,
        "stats": stats,
    }


def failed(error: Exception) -> dict[str, Any]:
    """Return the measured part of a row that could not be measured."""
    blank = dict.fromkeys(("metric", "unit", "better", "value", "p20", "p80", "note", "stats"))
    return blank | {"status": "failed", "error": f"{type(error).__name__}: {error}", "n": 0}
