"""Which cache serves which need, and what codecs cost in quality."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from transformers import LlamaConfig

import kvplug
from evals.setup.contenders import EXACT
from evals.suites import pareto

from .lookup import find, folders, rendered, report

SMOLLM2 = LlamaConfig(
    num_hidden_layers=30, hidden_size=576, num_attention_heads=9, num_key_value_heads=3
)


def choice() -> str:
    """Return which cache serves which need, and what it costs."""
    (run,), (drift,), quality = folders("decode-llama-1b"), folders("main-job"), _quality()
    context = max(run.config["context"])

    def cost(name: str) -> str:
        held, exact = (find(run, x, "bytes_held", 1, context)["value"] for x in (name, EXACT))
        faster = find(run, name, "speedup", 1, context)["value"]
        return f"{held / exact:.2f}x the memory, {faster:.1f}x as fast"

    def lossy(name: str) -> str:
        kl, top1 = (find(drift, name, metric, 1, 2048)["value"] for metric in ("kl", "top1"))
        return f"{cost(name)}, KL {kl:.5f}, top-1 {top1:.4f}"

    sinks = "sinks(sinks=4, window=1020)"
    endless = (
        f"{_of_exact(f'{sinks}+int8', 32768):.2f}x the memory of 32,768 tokens, and no more ever; "
        f"what left the window is forgotten ({quality[sinks].found} of hidden words found, with "
        f"all tokens {quality[EXACT].found})"
    )
    (gpu,) = folders("cuda-decode")
    off, on = (find(gpu, name, "decode", 1, 16384)["value"] for name in ("int4+host", "int4"))
    body = {
        "to lose nothing, and speed": ("growing", cost("growing")),
        "half the memory": ("int8", lossy("int8")),
        "the least memory that is safe": ("int4", lossy("int4")),
        "no end, at flat memory": (f"{sinks}+int8", endless),
        "to keep it off the GPU": ("int4+host", f"as `int4`, at {off / on:.2f}x its time"),
    }
    rows = [f"| {need} | `{name}` | {text} |" for need, (name, text) in body.items()]
    said = (
        f"Decoding at {context:,} tokens, 1B parameters in bfloat16 on 2 CPU cores; drift of a "
        "135M model; `int4+host` with 8B parameters on an H100."
    )
    head = "| you need | name | against transformers' default cache |"
    return "\n".join([head, "|---|---|---|", *rows, "", said])


def front() -> str:
    """Return bits and drift of codecs as they come and of rivals, the heaviest first."""
    (run,) = folders("pareto")
    table = pareto.tables(run.config, run.rows)[0]
    shown = ("strategy", "bits ↓", "KL, nat", "top-1", "Δ", "words")
    columns = [i for i, name in enumerate(table.head) if name.startswith(shown)]
    body = [[row[i] for i in columns] for row in table.body if not row[0].startswith("control:")]
    return f"{rendered([table.head[i] for i in columns], body)}\n\n{' '.join(table.notes)}"


def answers() -> str:
    """Return drift and retrieval of what is not exact."""
    body = [[name, *quality] for name, quality in _quality().items()]
    return rendered(["strategy", "KL, nat ↓", "top-1 ↑", "words found in 2,048 tokens ↑"], body)


class Quality(NamedTuple):
    """What a strategy does to predictions, as text."""

    kl: str
    top1: str
    found: str  # share of hidden words


@cache
def _quality() -> dict[str, Quality]:
    """Return the quality of what the full report has asked for words."""
    drift, hay, made = report("drift"), report("retrieval"), {}
    names = [r["strategy"] for r in hay.rows if r["metric"] == "retrieval"]
    for name in dict.fromkeys(names):
        kl, top1 = (find(drift, name, metric, 1, 2048)["value"] for metric in ("kl", "top1"))
        found = [
            r["value"]
            for r in hay.rows
            if (r["strategy"], r["metric"], r["context"]) == (name, "retrieval", 2048)
        ]
        made[name] = Quality(f"{kl:.5f}", f"{top1:.4f}", f"{sum(found) / len(found):.2f}")
    return made


def _of_exact(spec: str, context: int) -> float:
    """Return the bytes of a strategy against an exact cache's, beside a model in bfloat16."""
    size = {"context": context, "dtype": torch.bfloat16}
    exact = kvplug.estimate(f"kvplug:static(max_cache_len={context})", SMOLLM2, **size)
    return kvplug.estimate(spec, SMOLLM2, **size) / exact
