"""What a row says. Rows are long: one metric of one strategy each, so that they add up over runs
without reshaping.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

import numpy as np

if TYPE_CHECKING:
    from evals.setup.contenders import Contender


class Metric(NamedTuple):
    """What is measured, in which unit, and which way is better."""

    unit: str
    better: Literal["lower", "higher", "zero"]
    doc: str


METRICS = {
    "prefill": Metric("s", "lower", "the whole prompt in one forward, after a short warm-up"),
    "encode": Metric(
        "ms", "lower", "added to a prompt, beyond the exact cache: what is encoded, encoded"
    ),
    "encode_share": Metric("%", "lower", "the same in percent of the exact cache's prefill"),
    "encode_token": Metric(
        "ms/token", "lower", "blocks that decoding fills, encoded, over all tokens decoded"
    ),
    "first_token": Metric("s", "lower", "`generate` of one token, the whole prompt included"),
    "reused": Metric("tokens", "higher", "of a prompt, a row, that came from the store"),
    "reused_share": Metric("1", "higher", "of all prompts' tokens, those that came from the store"),
    "stored_per_token": Metric("B/token", "lower", "records in the store, over their tokens"),
    "decode": Metric(
        "ms/token", "lower", "one greedy step of the whole batch; median over the timed steps"
    ),
    "decode_new": Metric(
        "ms/token", "lower", "decode in the first round: lengths that this process had not met"
    ),
    "throughput": Metric("tokens/s", "higher", "tokens decoded per second over the whole batch"),
    "energy": Metric(
        "J/token", "lower", "used by all of the processor or GPU while decoding, over all tokens"
    ),
    "speedup": Metric("x", "higher", "times as fast as the reference, in the same loop"),
    "floor": Metric(
        "ms/token", "lower", "predicted: step without context, plus stored K/V over bandwidth"
    ),
    "floor_share": Metric("%", "higher", "the floor in percent of what was measured"),
    "attention": Metric(
        "us/call", "lower", "attention alone, one query token per row of the batch"
    ),
    "attention_error": Metric(
        "1", "lower", "relative root mean square difference to exact attention, random K/V"
    ),
    "bytes_held": Metric(
        "B", "lower", "every tensor reachable from the cache, shared storage once"
    ),
    "bytes_per_token": Metric("B/token", "lower", "bytes held by tokens of all rows"),
    "tokens_held": Metric(
        "tokens", "lower", "that a head keeps of those it has seen, mean over layers and heads"
    ),
    "bits": Metric(
        "bit", "lower", "held per number of keys and values, tokens in full precision at 16 bits"
    ),
    "bits_further": Metric("bit", "lower", "the same of the second half of the tokens alone"),
    "bytes_estimated": Metric("B", "lower", "what kvplug.estimate says without weights"),
    "estimate_error": Metric("%", "zero", "the estimate against the bytes held"),
    "peak_prefill": Metric(
        "B", "lower", "most that torch allocated in prefill, above what was there before the cache"
    ),
    "peak_decode": Metric("B", "lower", "the same while decoding"),
    "rss_prefill": Metric(
        "B", "lower", "most memory of the process in prefill, above that before the cache"
    ),
    "rss_decode": Metric("B", "lower", "the same while decoding"),
    "perplexity": Metric(
        "1", "lower", "exp of the mean NLL of the next token, text fed through the cache in chunks"
    ),
    "perplexity_delta": Metric(
        "%", "zero", "perplexity against the exact cache's; moves by luck on short texts"
    ),
    "kl": Metric("nat", "lower", "mean KL(exact || strategy) of the next-token distributions"),
    "kl_estimated": Metric("nat", "lower", "the same, by the Fisher information of what is stored"),
    "kl_generated": Metric("nat", "lower", "the same on text that the model itself generated"),
    "top1": Metric("1", "higher", "share of positions where both have the same most likely token"),
    "greedy": Metric(
        "tokens",
        "higher",
        "leading greedy tokens equal to the exact cache's; spread over the batch",
    ),
    "edit_distance": Metric(
        "1", "lower", "tokens to change into the exact cache's, over their number; over the batch"
    ),
    "exact_match": Metric("1", "higher", "share of continuations equal to the exact cache's"),
    "rouge1": Metric("1", "higher", "ROUGE-1 F1 against the exact cache's text"),
    "rougeL": Metric("1", "higher", "ROUGE-L F1 against the exact cache's text"),
    "retrieval": Metric(
        "1",
        "higher",
        "share of hidden words more likely than the others that could be the answer, asked for "
        "when the cache already holds the text as it stores it",
    ),
    "retrieval_asked": Metric("1", "higher", "the same, the question read with the text"),
    "retrieval_greedy": Metric(
        "1", "higher", "share of hidden words that are what greedy decoding says"
    ),
    "choosing_prefill": Metric(
        "%", "lower", "of the time of prefill, spent on choosing which tokens stay"
    ),
    "choosing_decode": Metric("%", "lower", "the same of the time of decode steps"),
    "generate": Metric("s", "lower", "all tokens of an answer, one by one after a short prompt"),
    "cache_gain": Metric("x", "higher", "times as fast as no cache, which recomputes every token"),
    "exponent": Metric("1", "lower", "slope of log time over log length, least squares"),
}


class Row(TypedDict):
    """One line of rows.jsonl."""

    suite: str  # a file of evals/suites; of a suite made of others, the part
    task: str  # what was measured together
    done: bool  # whether this is the task's last row
    strategy: str  # the row's name, as accepted by --strategies
    spec: str  # the strategy with every default written out; for a rival, its builder
    status: Literal["ok", "failed"]
    error: str | None  # class and message of what stopped this strategy; metric is then null
    metric: str | None  # a key of METRICS
    unit: str | None  # METRICS[metric].unit
    better: str | None  # METRICS[metric].better
    value: float | None  # null where it cannot be measured, and `note` says why
    p20: float | None  # 20th percentile of the n samples
    p80: float | None  # 80th percentile
    p99: float | None  # 99th percentile
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
    case: str | dict[str, float] | None  # what else tells rows apart: a bucket, a kernel's shape
    time: str  # UTC, ISO 8601, when the row was written


def measured(
    metric: str,
    *samples: float,
    value: float | None = None,
    note: str | None = None,
    stats: dict | None = None,
) -> dict[str, Any]:
    """Return the measured part of a row.

    The value is the samples' median, or `value` where samples only give its spread. No sample: the
    figure cannot be had here, and `note` says why.
    """
    if not all(math.isfinite(sample) for sample in samples):
        raise FloatingPointError(f"{metric} is not finite: {samples}")
    marks = np.percentile(samples, [20, 50, 80, 99]).tolist() if samples else [None] * 4
    p20, median, p80, p99 = marks
    what = METRICS[metric]
    return {
        "status": "ok",
        "error": None,
        "metric": metric,
        "unit": what.unit,
        "better": what.better,
        "value": median if value is None else value,
        "p20": p20,
        "p80": p80,
        "p99": p99,
        "n": len(samples),
        "note": note,
        "stats": stats,
    }


def failed(error: Exception) -> dict[str, Any]:
    """Return the measured part of a row that could not be measured."""
    empty = ("metric", "unit", "better", "value", "p20", "p80", "p99", "note", "stats")
    return dict.fromkeys(empty) | {
        "status": "failed",
        "error": f"{type(error).__name__}: {error}",
        "n": 0,
    }


def label(case: str | dict[str, float] | None) -> str | None:
    """Return a row's case as text, which can be shown and be a key.

    >>> label({"length": 512, "depth": 0.5, "keys": 1})
    'length 512, depth 0.5, keys 1'
    """
    return ", ".join(f"{k} {v:g}" for k, v in case.items()) if isinstance(case, dict) else case


def at(row: dict[str, Any], contender: Contender | None = None, **place: Any) -> dict[str, Any]:
    """Return a measured row with its own strategy, batch, context or case."""
    own = {"strategy": contender.name, "spec": contender.spec} if contender else {}
    return row | own | place
