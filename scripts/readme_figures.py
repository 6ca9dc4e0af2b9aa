"""What README.md and pages of docs/ tell of figures, written from committed result folders.

usage: python scripts/readme_figures.py

A block stands between `<!-- figures: NAME -->` and `<!-- end -->`; the function of that name makes
what is between. A test runs it and expects no change.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

import kvplug  # noqa: E402
from evals import suites  # noqa: E402
from evals.report.render import markdown  # noqa: E402
from evals.report.runs import Run, load  # noqa: E402
from evals.rows.tables import Table, share  # noqa: E402
from evals.setup import shapes  # noqa: E402
from evals.setup.contenders import EXACT  # noqa: E402
from evals.suites import decode as decode_suite  # noqa: E402
from evals.suites import drift as drift_suite  # noqa: E402
from evals.suites import encode as encode_suite  # noqa: E402
from evals.suites import pareto, quick  # noqa: E402
from evals.suites import prefix as prefix_suite  # noqa: E402
from evals.suites import retrieval as retrieval_suite  # noqa: E402

BENCHMARKS = ROOT / "docs" / "benchmarks"
REPORT = ROOT / "docs" / "reports" / "smollm2-135m"
PAGES = ROOT / "README.md", *(ROOT / "docs" / f"{x}.md" for x in ("auto", "retention", "speed"))
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
SMOLLM2 = LlamaConfig(
    num_hidden_layers=30, hidden_size=576, num_attention_heads=9, num_key_value_heads=3
)


def rewritten(text: str) -> str:
    """Return a text with every block made anew."""
    return BLOCK.sub(lambda m: f"{m[1]}{globals()[m[2]]()}\n{m[3]}", text)


def choice() -> str:
    """Return which cache serves which need, and what it costs."""
    (run,), (drift,), quality = _runs("decode-llama-1b"), _runs("main-job"), _quality()
    context = max(run.config["context"])

    def cost(name: str) -> str:
        held, exact = (_row(run, x, "bytes_held", 1, context)["value"] for x in (name, EXACT))
        faster = _row(run, name, "speedup", 1, context)["value"]
        return f"{held / exact:.2f}x the memory, {faster:.1f}x as fast"

    def lossy(name: str) -> str:
        kl, top1 = (_row(drift, name, metric, 1, 2048)["value"] for metric in ("kl", "top1"))
        return f"{cost(name)}, KL {kl:.5f}, top-1 {top1:.4f}"

    sinks = "sinks(sinks=4, window=1020)"
    endless = (
        f"{_of_exact(f'{sinks}+int8', 32768):.2f}x the memory of 32,768 tokens, and no more ever; "
        f"what left the window is forgotten ({quality[sinks].found} of hidden words found, with "
        f"all tokens {quality[EXACT].found})"
    )
    (gpu,) = _runs("cuda-decode")
    off, on = (_row(gpu, name, "decode", 1, 16384)["value"] for name in ("int4+host", "int4"))
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


def bigger() -> str:
    """Return decoding of a model of 1B: milliseconds per token and bytes held, by context."""
    (run,) = _runs("decode-llama-1b")
    contexts = run.config["context"]
    body = [
        [
            name,
            *(_time(run, name, 1, x) for x in contexts),
            *(f"{_row(run, name, 'bytes_held', 1, x)['value'] / 1e6:,.0f}" for x in contexts),
        ]
        for name in (EXACT, "growing", "int8", "int4")
    ]
    head = [f"{what} at {x:,}" for what in ("ms/token ↓", "held, MB ↓") for x in contexts]
    versions = ", ".join(f"{x} {run.env['versions'][x]}" for x in ("torch", "transformers"))
    table = _table(["strategy", *head], body)
    return f"{table}\n\n{run.env['hardware']}, {versions}. {_noise(run)}"


def front() -> str:
    """Return bits and drift of codecs as they come and of rivals, the heaviest first."""
    (run,) = _runs("pareto")
    table = pareto.tables(run.config, run.rows)[0]
    shown = ("strategy", "bits ↓", "KL, nat", "top-1", "Δ", "words")
    columns = [i for i, name in enumerate(table.head) if name.startswith(shown)]
    body = [[row[i] for i in columns] for row in table.body if not row[0].startswith("control:")]
    return f"{_table([table.head[i] for i in columns], body)}\n\n{' '.join(table.notes)}"


def main_job() -> str:
    """Return the main job's table, fewer columns, and its line on noise."""
    (run,) = _runs("main-job")
    (table,) = quick.tables(run.config, run.rows)
    shown = ("strategy", "held", "decode", "prefill", "Δ", "KL", "top-1", "greedy")
    columns = [i for i, name in enumerate(table.head) if name.startswith(shown)]
    body = [[row[i] for i in columns] for row in table.body if not row[0].startswith("control:")]
    noise = next(line for line in table.notes if line.startswith("A/A"))
    return f"{_table([table.head[i] for i in columns], body)}\n\n{noise}"


def peaks() -> str:
    """Return the most memory that some of the main job's rows took."""
    (run,) = _runs("main-job")
    (context,) = run.config["context"]
    told = []
    for name in (EXACT, "growing", "int8", "int4"):
        tops = [_row(run, name, f"peak_{x}", 1, context)["value"] for x in ("prefill", "decode")]
        told.append("`{}` {:.0f} and {:.0f}".format(name, *(top / 1e6 for top in tops)))
    said = "The most that torch allocated beside the model, in prefill and while decoding, MB"
    return f"{said}: {', '.join(told)}."


def decode() -> str:
    """Return milliseconds per token, and times as fast as the exact cache, by context and batch."""
    runs = _runs("decode-float32", "decode-bfloat16")
    names = EXACT, "growing", "kvplug:static", "int8", "int4", "transformers:quantized"
    body = []
    for run in runs:
        places = {(r["batch"], r["context"]) for r in run.rows if r["metric"] == "speedup"}
        for batch, context in sorted(places):
            cells = [_time(run, name, batch, context) for name in names]
            body.append([f"{context:,}, {batch}, {run.config['dtype']}", *cells])
    return _table(["context, batch, dtype", *names], body)


def presets() -> str:
    """Return how the integer codecs decode, in one loop."""
    (run,) = _runs("decode-presets")
    contexts = sorted({r["context"] for r in run.rows if r["metric"] == "speedup"})
    names = dict.fromkeys(r["strategy"] for r in run.rows if r["metric"] == "speedup")
    body = [
        [name, *(_time(run, name, 1, context) for context in contexts)]
        for name in names
        if not name.startswith("control:")
    ]
    head = ["ms per token", *(f"at {context:,}" for context in contexts)]
    return f"{_table(head, body)}\n\n{_noise(run)}"


def encoding() -> str:
    """Return what encoding adds to a prompt, and to a token that is decoded."""
    (run,) = _runs("encode")
    (table,) = encode_suite.tables(run.config, run.rows)
    body = [row for row in table.body if row[0] != EXACT]
    columns = [i for i, name in enumerate(table.head) if not name.startswith("prefill")]
    head, *body = ([row[i] for i in columns] for row in (table.head, *body))
    (prefill,) = (r["value"] for r in run.rows if r["metric"] == "prefill")
    return f"{_table(head, body)}\n\n{table.notes[0]} A prefill: {prefill:.2f} s."


def no_context() -> str:
    """Return what a step costs without context."""
    (run,) = _runs("decode-float32")
    step = _row(run, EXACT, "decode", 1, 0)["value"]
    return f"Without any context a step took {step:.1f} ms, which bounds every ratio at batch 1."


def kernel() -> str:
    """Return one layer's attention against torch's, by heads and by what is in the caches."""
    (run,) = _runs("kernel")
    cases = dict.fromkeys(r["case"] for r in run.rows if r["metric"] == "speedup")
    names = "int8+numba", "int4+numba", "int2+numba", "torch:sdpa-bfloat16"
    body = []
    for case in cases:
        found = [_row(run, name, "speedup", 1, 6016, case)["value"] for name in names]
        body.append([case, *(f"{x:.2f}x" for x in found)])
    return _table(["one layer at 6,016 tokens", *names], body)


def cuda() -> str:
    """Return decoding on a GPU: at lengths new to the process, at others, and bytes held."""
    (run,) = _runs("cuda-decode")
    names = EXACT, "growing", "int8", "int4", "int4+host", "transformers:static"
    names += ("transformers:offloaded",)
    cells = (1, 4096), (1, 16384), (8, 4096)
    body = []
    for name in names:
        held = _row(run, name, "bytes_held", 1, 16384)["value"]
        times = [
            f"{_row(run, name, metric, *cell)['value']:.0f}"
            for metric in ("decode_new", "decode")
            for cell in cells
        ]
        body.append([name, f"{held / 1e6:,.0f}", *times])
    what = [f"{batch} x {context:,}" for batch, context in cells]
    told = [f"{x}, {when}" for when in ("new", "met before") for x in what]
    table = _table(["ms/token ↓", "held, MB ↓ (1 x 16,384)", *told], body)
    return f"{table}\n\n{_noise(run)}"


def kept() -> str:
    """Return in a sentence what is found with few tokens, asked in the prompt and after it."""
    (run,) = _runs("retrieval")
    name = "snapkv(budget=128)+int4"
    held, exact = (_row(run, x, "bytes_held", 1, 2048)["value"] for x in (name, EXACT))
    asked, whole = (_found(run, x, "retrieval_asked") for x in (name, EXACT))
    later, later_whole = (_found(run, x, "retrieval") for x in (name, EXACT))
    return (
        f"Of a prompt of 2,048 tokens `{name}` holds {held / exact:.2f} of the exact cache's "
        f"bytes, and the model finds {asked} of the hidden words that the prompt asks for, with "
        f"the exact cache {whole}; what only a later question asks for is gone: {later}, with the "
        f"exact cache {later_whole}. In brackets 95 % intervals (Wilson)."
    )


def asked() -> str:
    """Return words found by methods that let tokens go, asked in the prompt and after it."""
    return _words("retrieval")


def unseen() -> str:
    """Return words found that are asked for after the text alone."""
    return _words("unseen")


def _words(name: str) -> str:
    (run,) = _runs(name)
    (table,) = suites.get(run.suite).tables(run.config, run.rows)
    columns = [i for i, head in enumerate(table.head) if "greedy" not in head]
    body = [[row[i] for i in columns] for row in table.body]
    return f"{_table([table.head[i] for i in columns], body)}\n\n{table.notes[0]}"


def streaming() -> str:
    """Return what letting tokens go again and again costs a text that goes on."""
    body = []
    for run in _runs("stream-heads", "stream", "stream-512"):
        exact = _row(run, EXACT, "bytes_held", 1, 2048)["value"]
        for name in dict.fromkeys(row["strategy"] for row in run.rows):
            if name == EXACT or name.startswith("control:"):
                continue
            kl, top1 = (_row(run, name, metric, 1, 2048) for metric in ("kl", "top1"))
            held = _row(run, name, "bytes_held", 1, 2048)["value"]
            spread = f"{kl['value']:.4f} ({kl['p20']:.4f}-{kl['p80']:.4f})"
            body.append([name, f"{held / exact:.2f}x", spread, f"{top1['value']:.3f}"])
    table = _table(["strategy", "held", "KL, nat (p20-p80 of windows) ↓", "top-1 ↑"], body)
    return f"{table}\n\n{drift_suite.method(run.config)}"


def choosing() -> str:
    """Return what choosing costs, of prefill and of decoding."""
    (run,) = _runs("choosing")
    (table,) = suites.get(run.suite).tables(run.config, run.rows)
    return f"{_table(table.head, table.body)}\n\n{table.notes[0]}"


def heads() -> str:
    """Return how long a decode step takes of heads of unlike budgets, and what they hold."""
    (run,) = _runs("decode-heads")
    (context,) = run.config["context"]
    exact = _row(run, EXACT, "bytes_held", 1, context)["value"]
    body = [
        [
            name,
            f"{_row(run, name, 'bytes_held', 1, context)['value'] / exact:.2f}x",
            _time(run, name, 1, context),
        ]
        for name in dict.fromkeys(row["strategy"] for row in run.rows)
        if not name.startswith("control:")
    ]
    return f"{_table(['strategy', 'held', 'ms/token ↓'], body)}\n\n{_noise(run)}"


@cache
def picks() -> str:
    """Return what `auto` takes for public models on 4 GiB, and the bytes that it predicts."""
    body = []
    asks = (
        ("none", None),
        ("low", None),
        ("medium", None),
        ("medium", "prompt"),
        ("medium", "stream"),
    )
    for name in ("llama-8b", "qwen3-8b", "mistral-7b", "gemma3-4b", "smollm2-1.7b"):
        for batch in (1, 8, 24):
            size = {"context": 8192, "batch": batch, "dtype": "bfloat16"}
            cells = []
            for drift, use in asks:
                choice = kvplug.recommend(
                    shapes.config(name), budget="4GiB", drift=drift, use=use, **size
                )
                best = choice.best
                cells.append("-" if best is None else f"`{best.spec}` {best.held / 2**30:.2f} GiB")
            body.append([name, f"{batch} x 8,192", *cells])
    heads = [f"drift='{drift}'" + (f", use='{use}'" if use else "") for drift, use in asks]
    return _table(["model", "tokens", *heads], body)


def prefix() -> str:
    """Return seconds to the first token of prompts whose beginning is stored, and what that costs.

    transformers' own cache: as its documented recipe copies it, and fed by `prefill_chunk_size`.
    """
    runs = _runs("prefix", "prefix-4096")
    body = [_reused(run, name) for run in runs for name in (EXACT, "growing", "int8", "int4")]
    head = ["strategy", "prompt", "s ↓, all computed", "from memory", "from a folder", "from Redis"]
    head += ["nothing found, % more ↓", "B/token ↓"]
    notes = prefix_suite.tables(runs[0].config, runs[0].rows)[-1].notes
    noise = next(note for note in notes if note.startswith("A/A")).partition(";")[0]
    (pays,) = prefix_suite.pays(runs[0].rows)
    return f"{_table(head, body)}\n\n{noise}. {pays}"


def _reused(run: Run, name: str) -> list[str]:
    """Return the line of a strategy, at the longest prompt of a run."""
    context = max(run.config["context"])

    def value(metric: str, case: str) -> float:
        return _row(run, name, metric, 1, context, case)["value"]

    def cell(case: str) -> str:
        return f"{value('first_token', case):.2f} ({value('speedup', case):.1f}x)"

    if name == EXACT:
        loaded, cold, held = [cell("copied"), "-", "-"], "cut", "-"
    else:
        loaded, cold = [cell(case) for case in prefix_suite.STORED], "first"
        held = f"{value('stored_per_token', 'file'):,.0f}"
    whole = value("first_token", "alone")
    more = 100 * (value("first_token", cold) / whole - 1)
    return [name, f"{context:,}", f"{whole:.2f}", *loaded, f"{more:+.0f}", held]


def answers() -> str:
    """Return drift and retrieval of what is not exact."""
    body = [[name, *quality] for name, quality in _quality().items()]
    return _table(["strategy", "KL, nat ↓", "top-1 ↑", "words found in 2,048 tokens ↑"], body)


class Quality(NamedTuple):
    """What a strategy does to predictions, as text."""

    kl: str
    top1: str
    found: str  # share of hidden words


@cache
def _quality() -> dict[str, Quality]:
    """Return the quality of what the full report has asked for words."""
    drift, hay, made = _part("drift"), _part("retrieval"), {}
    names = [r["strategy"] for r in hay.rows if r["metric"] == "retrieval"]
    for name in dict.fromkeys(names):
        kl, top1 = (_row(drift, name, metric, 1, 2048)["value"] for metric in ("kl", "top1"))
        found = [
            r["value"]
            for r in hay.rows
            if (r["strategy"], r["metric"], r["context"]) == (name, "retrieval", 2048)
        ]
        made[name] = Quality(f"{kl:.5f}", f"{top1:.4f}", f"{sum(found) / len(found):.2f}")
    return made


def _found(run: Run, strategy: str, metric: str) -> str:
    """Return the share of words found, at any depth, and its interval."""
    rows = retrieval_suite.pooled([r for r in run.rows if r["metric"] == metric])
    return share(next(row for row in rows if row["strategy"] == strategy), None)


def _of_exact(spec: str, context: int) -> float:
    """Return the bytes of a strategy against an exact cache's, beside a model in bfloat16."""
    size = {"context": context, "dtype": torch.bfloat16}
    exact = kvplug.estimate(f"kvplug:static(max_cache_len={context})", SMOLLM2, **size)
    return kvplug.estimate(spec, SMOLLM2, **size) / exact


@cache
def _runs(*names: str) -> list[Run]:
    return load([BENCHMARKS / name for name in names])


@cache
def _report() -> list[Run]:
    return load([REPORT])


def _part(suite: str) -> Run:
    return next(run for run in _report() if run.suite == suite)


def _row(run: Run, strategy: str, metric: str, batch: int, context: int, case: str | None = None):
    place = strategy, metric, batch, context, case
    names = "strategy", "metric", "batch", "context", "case"
    return next(row for row in run.rows if tuple(row[name] for name in names) == place)


def _time(run: Run, strategy: str, batch: int, context: int) -> str:
    row = _row(run, strategy, "decode", batch, context)
    if strategy == EXACT:
        return f"{row['value']:.1f}"
    ratio = _row(run, strategy, "speedup", batch, context)["value"]
    return f"{row['value']:.1f} ({ratio:.2f}x{run.noise.flag(row, ratio)})"


def _noise(run: Run) -> str:
    """Return how far the reference of a decode run is from itself."""
    notes = decode_suite.tables(run.config, run.rows)[-1].notes
    return f"{next(line for line in notes if 'A/A' in line).partition(';')[0]}."


def _table(head: list[str], body: list[list[str]]) -> str:
    return markdown([Table("", head, body, [])], {}, []).strip()


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rewritten(page.read_text(encoding="utf-8")), encoding="utf-8")
