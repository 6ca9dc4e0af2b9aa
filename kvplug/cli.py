"""`kvplug list`, `estimate`, `recommend`, `calibrate`, `run`, `store` and `warmup`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from .errors import KvplugError, SpecError
from .store.cli import add_arguments
from .store.cli import run as run_store
from .strategy import ALLOWED, USES
from .units import text_of

STRATEGIES = (
    "growing", "kvplug:static", "int8", "k8v4", "int4", "int3", "int2",
    "window(length=4096)", "sinks", "sinks+int8", "int4+host", "disk",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 where it worked, 2 where nothing that was asked for can be."""
    from . import __version__  # not yet there while the package is imported

    parser = argparse.ArgumentParser(
        prog="kvplug", description="Pluggable KV caches for Hugging Face transformers."
    )
    parser.add_argument("--version", action="version", version=f"kvplug {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every stage and preset, with one line each")
    sizes = commands.add_parser(
        "estimate",
        help="bytes held per strategy, from a config without weights",
        epilog="example: kvplug estimate --model Qwen/Qwen3-8B --context 32768 int4 sinks",
    )
    sizes.add_argument("strategies", nargs="*", help=f"default: {', '.join(STRATEGIES)}")
    _add_sizes(sizes, "tokens of the prompt")
    advice = commands.add_parser(
        "recommend",
        help="what cache_implementation='auto' would choose, among what, and why",
        epilog="example: kvplug recommend --model Qwen/Qwen3-8B --context 32768 --memory 4GiB",
    )
    _add_sizes(advice, "tokens in all, prompt and answer")
    advice.add_argument("--memory", help="bytes the cache may hold (default: 0.8 of what is free)")
    advice.add_argument(
        "--use",
        choices=USES,
        help="what for: one question in the prompt, questions that come later, a text that goes on "
        "(default: no token goes)",
    )
    advice.add_argument(
        "--drift", choices=ALLOWED, default="none", help="what may be lost (default none)"
    )
    advice.add_argument("--calibration", help="file of `kvplug calibrate`, for prefix and stream")
    advice.add_argument("--device", default="cpu", help="on which the model runs (default cpu)")
    measure = commands.add_parser(
        "calibrate",
        help="measure a model's layers, for codecs to take widths of their own in each",
        epilog="example: kvplug calibrate --model Qwen/Qwen3-8B --out qwen3-8b.safetensors",
    )
    measure.add_argument("--model", required=True, help="Hub id or local folder")
    measure.add_argument(
        "--text", help="file of 4,096 tokens or more (default: Python's language reference)"
    )
    measure.add_argument("--out", required=True, help="file to write")
    launch = commands.add_parser(
        "run",
        help="a command, unedited, that knows the names and takes one where it names no cache",
        usage="kvplug run [--cache STRATEGY] -- COMMAND [ARGUMENT ...]",
        epilog="example: kvplug run --cache int4+host -- python their_script.py",
    )
    launch.add_argument(
        "--cache",
        metavar="STRATEGY",
        help="for generate calls that name no cache (default: such calls are left alone)",
    )
    launch.add_argument("words", nargs="+", metavar="COMMAND", help="what to start, in full")
    store = commands.add_parser(
        "store",
        help="what a store of prefixes holds: stat, ls, verify, clear",
        epilog="example: kvplug store stat file:///var/kv",
    )
    add_arguments(store)
    commands.add_parser("warmup", help="compile the CPU kernel now, once per machine")
    args = parser.parse_args(argv)
    try:
        return COMMANDS[args.command](args)
    except (KvplugError, OSError) as e:
        print(f"kvplug: {e}", file=sys.stderr)
        return 2


def _list(args: argparse.Namespace) -> int:
    from .cost import cost, source
    from .registry import available
    from .spec import DEFAULTS, PRESETS, parse

    for kind, stages in available().items():
        print(f"{kind} (default {DEFAULTS[kind]})")
        for name, line in stages.items():
            print(f"  {name:<12} {line}{_of_codec(name) if kind == 'codec' else ''}")
    print("presets")
    for name, spec in PRESETS.items():
        print(f"  {name:<22} {spec:<8} {cost(parse(spec))}")
    print(source())
    return 0


def _of_codec(name: str) -> str:
    """What a codec costs as it comes, and the kernels that read it; nothing of a broken plugin."""
    from .cost import cost
    from .registry import REGISTRIES, find
    from .spec import parse

    said, readers = "", []
    with contextlib.suppress(Exception):  # a broken plugin must not hide the others
        said = f" {cost(parse(name))}."
    for kernel in REGISTRIES["kernel"].names():
        with contextlib.suppress(Exception):
            if kernel != "auto" and not find(kernel)().refuses(find(name)()):
                readers.append(kernel)
    return f"{said} [{', '.join(readers)}]"


def _estimate(args: argparse.Namespace) -> int:
    from transformers import AutoConfig

    from .cost import cost, source
    from .estimate import estimate
    from .spec import parse

    specs = args.strategies or STRATEGIES
    for spec in specs:
        parse(spec)  # a name that nothing has is no row of the table
    config = AutoConfig.from_pretrained(args.model)
    of = {"context": args.context, "batch": args.batch, "dtype": args.dtype}
    full = estimate("growing", config, **of)
    print(f"{'strategy':<40} {'bytes':>16} {'MiB':>10} {'of exact':>9}  drift")
    code = 2
    for spec in specs:
        try:
            size = estimate(spec, config, **of)
        except SpecError as e:
            print(f"{spec:<40} refused: {e}")
            continue
        held = f"{size:>16,} {size / 2**20:>10.1f} {size / full:>8.2f}x"
        print(f"{spec:<40} {held}  {cost(parse(spec))}")
        code = 0
    print(source())
    return code


def _recommend(args: argparse.Namespace) -> int:
    from transformers import AutoConfig

    from .choose import recommend

    choice = recommend(
        AutoConfig.from_pretrained(args.model),
        context=args.context,
        batch=args.batch,
        budget=args.memory,
        use=args.use,
        drift=args.drift,
        calibration=args.calibration,
        dtype=args.dtype,
        device=args.device,
    )
    print(f"{'strategy':<36} {'holds':>10}  loses")
    for x in choice.options:
        if x.held is None:
            print(f"{x.spec:<36} refused: {x.refusal}")
            continue
        barred = "" if x.allowed else f"drift={args.drift!r} does not allow it"
        why = "chosen" if x == choice.best else barred or ("" if x.fits else "does not fit")
        print(f"{x.spec:<36} {text_of(x.held):>10}  {x.loss}  {why}".rstrip())
    print(choice.reason)
    return 2 if choice.best is None else 0


def _calibrate(args: argparse.Namespace) -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .calibrate import calibrate

    text = None if args.text is None else Path(args.text).read_text(encoding="utf-8")
    if not Path(args.out).absolute().parent.is_dir():
        raise SpecError(f"--out {args.out!r}: there is no such folder")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    about = calibrate(model, tokenizer, args.out, text)
    uses = {"widths": f"int3(calibration={args.out!r})", "budgets": f"expected(heads={args.out!r})"}
    missing = about["unmeasured"]
    print(
        f"{args.out}: {Path(args.out).stat().st_size:,} bytes, from {about['tokens']:,} tokens of "
        f"{about['text']}; use it as {', '.join(x for k, x in uses.items() if k not in missing)}"
    )
    for section, why in missing.items():
        print(f"nothing on {section}: {why}")
    return 0


def _run(args: argparse.Namespace) -> int:
    from .launch import run

    try:
        run(args.cache, args.words)
    except OSError as e:
        print(f"kvplug: cannot start {args.words[0]!r}: {e.strerror}", file=sys.stderr)
        return 127 if isinstance(e, FileNotFoundError) else 126  # as a shell answers


def _warmup(args: argparse.Namespace) -> int:
    from .registry import find

    find("numba")().warmup()
    print("the CPU kernel is compiled and kept on disk")
    return 0


def _add_sizes(parser: argparse.ArgumentParser, context: str) -> None:
    parser.add_argument("--model", required=True, help="Hub id, local folder or config.json")
    parser.add_argument("--context", type=_positive, required=True, help=context)
    parser.add_argument("--batch", type=_positive, default=1, help="rows (default 1)")
    parser.add_argument(
        "--dtype", default=None, help="of keys and values, e.g. bfloat16 (default: the config's)"
    )


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


COMMANDS = {
    "list": _list,
    "estimate": _estimate,
    "recommend": _recommend,
    "calibrate": _calibrate,
    "run": _run,
    "store": run_store,
    "warmup": _warmup,
}
