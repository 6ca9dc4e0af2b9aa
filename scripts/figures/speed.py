"""Speed and memory, on a CPU and a GPU."""

from __future__ import annotations

from evals.setup.contenders import EXACT
from evals.suites import encode as encode_suite
from evals.suites import quick

from .lookup import apart, find, folders, rendered, step


def bigger() -> str:
    """Return decoding of a model of 1B: milliseconds per token and bytes held, by context."""
    (run,) = folders("decode-llama-1b")
    contexts = run.config["context"]
    body = [
        [
            name,
            *(step(run, name, 1, x) for x in contexts),
            *(f"{find(run, name, 'bytes_held', 1, x)['value'] / 1e6:,.0f}" for x in contexts),
        ]
        for name in (EXACT, "growing", "int8", "int4")
    ]
    head = [f"{what} at {x:,}" for what in ("ms/token ↓", "held, MB ↓") for x in contexts]
    versions = ", ".join(f"{x} {run.env['versions'][x]}" for x in ("torch", "transformers"))
    table = rendered(["strategy", *head], body)
    return f"{table}\n\n{run.env['hardware']}, {versions}. {apart(run)}"


def main_job() -> str:
    """Return the main job's table, fewer columns, and its line on noise."""
    (run,) = folders("main-job")
    (table,) = quick.tables(run.config, run.rows)
    shown = ("strategy", "held", "decode", "prefill", "Δ", "KL", "top-1", "greedy")
    columns = [i for i, name in enumerate(table.head) if name.startswith(shown)]
    body = [[row[i] for i in columns] for row in table.body if not row[0].startswith("control:")]
    noise = next(line for line in table.notes if line.startswith("A/A"))
    return f"{rendered([table.head[i] for i in columns], body)}\n\n{noise}"


def peaks() -> str:
    """Return the most memory that some of the main job's rows took."""
    (run,) = folders("main-job")
    (context,) = run.config["context"]
    told = []
    for name in (EXACT, "growing", "int8", "int4"):
        tops = [find(run, name, f"peak_{x}", 1, context)["value"] for x in ("prefill", "decode")]
        told.append("`{}` {:.0f} and {:.0f}".format(name, *(top / 1e6 for top in tops)))
    said = "The most that torch allocated beside the model, in prefill and while decoding, MB"
    return f"{said}: {', '.join(told)}."


def decode() -> str:
    """Return milliseconds per token, and times as fast as the exact cache, by context and batch."""
    runs = folders("decode-float32", "decode-bfloat16")
    names = EXACT, "growing", "kvplug:static", "int8", "int4", "transformers:quantized"
    body = []
    for run in runs:
        places = {(r["batch"], r["context"]) for r in run.rows if r["metric"] == "speedup"}
        for batch, context in sorted(places):
            cells = [step(run, name, batch, context) for name in names]
            body.append([f"{context:,}, {batch}, {run.config['dtype']}", *cells])
    return rendered(["context, batch, dtype", *names], body)


def presets() -> str:
    """Return how the integer codecs decode, in one loop."""
    (run,) = folders("decode-presets")
    contexts = sorted({r["context"] for r in run.rows if r["metric"] == "speedup"})
    names = dict.fromkeys(r["strategy"] for r in run.rows if r["metric"] == "speedup")
    body = [
        [name, *(step(run, name, 1, context) for context in contexts)]
        for name in names
        if not name.startswith("control:")
    ]
    head = ["ms per token", *(f"at {context:,}" for context in contexts)]
    return f"{rendered(head, body)}\n\n{apart(run)}"


def encoding() -> str:
    """Return what encoding adds to a prompt, and to a token that is decoded."""
    (run,) = folders("encode")
    (table,) = encode_suite.tables(run.config, run.rows)
    body = [row for row in table.body if row[0] != EXACT]
    columns = [i for i, name in enumerate(table.head) if not name.startswith("prefill")]
    head, *body = ([row[i] for i in columns] for row in (table.head, *body))
    (prefill,) = (r["value"] for r in run.rows if r["metric"] == "prefill")
    return f"{rendered(head, body)}\n\n{table.notes[0]} A prefill: {prefill:.2f} s."


def no_context() -> str:
    """Return what a step costs without context."""
    (run,) = folders("decode-float32")
    step = find(run, EXACT, "decode", 1, 0)["value"]
    return f"Without any context a step took {step:.1f} ms, which bounds every ratio at batch 1."


def kernel() -> str:
    """Return one layer's attention against torch's, by heads and by what is in the caches."""
    (run,) = folders("kernel")
    cases = dict.fromkeys(r["case"] for r in run.rows if r["metric"] == "speedup")
    names = "int8+numba", "int4+numba", "int2+numba", "torch:sdpa-bfloat16"
    body = []
    for case in cases:
        found = [find(run, name, "speedup", 1, 6016, case)["value"] for name in names]
        body.append([case, *(f"{x:.2f}x" for x in found)])
    return rendered(["one layer at 6,016 tokens", *names], body)


def cuda() -> str:
    """Return decoding on a GPU: at lengths new to the process, at others, and bytes held."""
    (run,) = folders("cuda-decode")
    names = EXACT, "growing", "int8", "int4", "int4+host", "transformers:static"
    names += ("transformers:offloaded",)
    cells = (1, 4096), (1, 16384), (8, 4096)
    body = []
    for name in names:
        held = find(run, name, "bytes_held", 1, 16384)["value"]
        times = [
            f"{find(run, name, metric, *cell)['value']:.0f}"
            for metric in ("decode_new", "decode")
            for cell in cells
        ]
        body.append([name, f"{held / 1e6:,.0f}", *times])
    what = [f"{batch} x {context:,}" for batch, context in cells]
    told = [f"{x}, {when}" for when in ("new", "met before") for x in what]
    table = rendered(["ms/token ↓", "held, MB ↓ (1 x 16,384)", *told], body)
    return f"{table}\n\n{apart(run)}"
