"""`kvplug run`: a default strategy for programs that never heard of kvplug, unedited.

`run` replaces itself by the command, so exit code, signals, terminal and job control are the
command's own. It leaves two marks in the environment, which every child process inherits: the
strategy, and on PYTHONPATH a folder with a `sitecustomize` that imports kvplug in each Python
process that imports transformers' `generate`; `import kvplug` ends by `start`.

There, `generate` calls that name no cache take the strategy. It is a default, not an order: a call
that names its own cache or passes one keeps it, and what the strategy cannot serve is left to
transformers. Each of that is said on stderr, once per model and reason, and counted at exit.
"""

from __future__ import annotations

import atexit
import copy
import functools
import inspect
import os
import shlex
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from transformers import GenerationMixin

from . import compat
from .errors import KvplugError, SpecError, UnknownHost
from .hook import cache_in
from .spec import PREFIX, is_ours, parse

if TYPE_CHECKING:
    from transformers import GenerationConfig

STRATEGY, PROCESS = "KVPLUG_RUN", "KVPLUG_RUN_PROCESS"
STARTUP = Path(__file__).parent / "startup"
# a model that prepares its cache by code of its own, or a call that failed before
STARTED = "was left alone: it never asked for a cache"


def run(spec: str | None, command: list[str]) -> NoReturn:
    """Become `command`, with `spec` as the default of its `generate` calls; without one, they only
    know the names.

    Commands are looked for beside this Python first, so that `python` is the one with kvplug in it.

    Raises:
        SpecError: the spec cannot be, or is a name of transformers; nothing was started.
        OSError: the command cannot be started.
    """
    words = shlex.join(command)
    if spec is None:
        line = f"the names of kvplug are known to the generate calls of `{words}`"
    elif is_ours(spec):
        parse(spec)
        line = f"{spec} for each generate call of `{words}` that names no cache"
    else:
        raise SpecError(
            f"{spec!r} is a name of transformers, which `run` does not set. Ours: '{PREFIX}static' "
            "and the like, or stage names such as 'int4+host'; `kvplug list` shows them"
        )
    env = dict(os.environ)
    env[STRATEGY], env[PROCESS] = spec or "", str(os.getpid())  # exec keeps the process
    beside = {"PATH": Path(sys.executable).parent, "PYTHONPATH": STARTUP}
    for name, folder in beside.items():
        env[name] = os.pathsep.join(filter(None, (str(folder), env.get(name))))
    say(f"{line}; no further line means that there was no call")
    sys.stdout.flush()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and exec would pass that on
    os.execvpe(command[0], command, env)


def start() -> None:
    """Make the strategy of the environment, if any, this process's default; report at exit."""
    spec = os.environ.get(STRATEGY)
    if spec is None:
        return
    try:
        if spec:
            parse(spec)
        if missing := compat.problems():
            raise UnknownHost(compat.advice(missing))
    except KvplugError as e:
        say(f"{e}: generate calls of {sys.executable} are left to transformers")
        return
    calls = default(spec or None)
    atexit.register(report, calls)
    os.register_at_fork(after_in_child=calls.clear)  # a forked child counts its own


def default(spec: str | None) -> Counter[str]:
    """Have `generate` calls without a cache of their own take `spec`, above `hook`'s methods.

    Returns what will have happened, and how often.
    """
    calls: Counter[str] = Counter()
    hooked, lock = getattr(GenerationMixin, compat.PREPARE_CACHE), threading.Lock()
    signature = inspect.signature(hooked)

    def count(model: GenerationMixin, what: str) -> None:
        started, what = (f"{type(model).__name__} {x}" for x in (STARTED, what))
        with lock:
            calls[started] -= 1
            if calls[started] <= 0:
                del calls[started]
            calls[what] += 1
            first = calls[what] == 1
        if first:
            say(what)

    configured = getattr(GenerationMixin, compat.PREPARE_CONFIG)

    @functools.wraps(configured)
    def prepare_config(self: GenerationMixin, *args: Any, **kwargs: Any) -> Any:
        with lock:  # until `count` knows better
            calls[f"{type(self).__name__} {STARTED}"] += 1
        return configured(self, *args, **kwargs)

    @functools.wraps(hooked)
    def prepare(self: GenerationMixin, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        config, model_kwargs = (call.arguments[x] for x in ("generation_config", "model_kwargs"))
        own = _own(config, model_kwargs) or ("" if spec else "was left alone: it names no cache")
        if own:
            count(self, own)
            return hooked(self, *args, **kwargs)
        named = copy.copy(config)  # the caller's object may be shared between threads
        named.cache_implementation = spec
        call.arguments["generation_config"] = named
        try:
            result = hooked(*call.args, **call.kwargs)
        except KvplugError as e:
            count(self, f"was left alone: {e}")
            return hooked(self, *args, **kwargs)
        count(self, f"took {spec}")
        return result

    setattr(GenerationMixin, compat.PREPARE_CONFIG, prepare_config)
    setattr(GenerationMixin, compat.PREPARE_CACHE, prepare)
    return calls


def _own(config: GenerationConfig, model_kwargs: dict) -> str:
    """What a call has of its own that the default respects, "" if nothing."""
    if config.is_assistant:
        return "was left alone: it assists another model"
    if is_ours(config.cache_implementation):
        return "named a strategy itself"  # which one is a client's word: there is no end of them
    if config.cache_implementation is not None:
        return f"was left alone: it names {config.cache_implementation!r}"
    if (given := cache_in(model_kwargs)) is not None:
        return f"was left alone: it was given a {type(given).__name__}"
    return "was left alone: it was told use_cache=False" if config.use_cache is False else ""


def report(calls: Counter[str]) -> None:
    """Say at exit what happened to every call; a process below the first only if there were any."""
    if calls:
        each = "; ".join(f"{what} ({n})" for what, n in calls.items())
        say(f"{calls.total()} generate call{'s' if calls.total() > 1 else ''}: {each}")
    elif os.environ[PROCESS] == str(os.getpid()):
        say("no generate call")


def say(text: str) -> None:
    """One line on stderr; processes below the first give their number."""
    first = os.environ.get(PROCESS, str(os.getpid())) == str(os.getpid())
    print(f"kvplug run{'' if first else f' [{os.getpid()}]'}: {text}", file=sys.stderr, flush=True)
