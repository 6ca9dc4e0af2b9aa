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

import transformers
from transformers import GenerationMixin

from . import compat
from .cache import is_ours
from .errors import KvplugError, SpecError
from .hook import _cache_in
from .spec import PREFIX, parse

if TYPE_CHECKING:
    from transformers import GenerationConfig

STRATEGY, PROCESS = "KVPLUG_RUN", "KVPLUG_RUN_PROCESS"
STARTUP = Path(__file__).parent / "startup"


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
        line = f"`{words}` knows the names of kvplug; calls that name no cache are left alone"
    elif is_ours(spec):
        parse(spec)
        line = (
            f"{spec} for each generate call of `{words}` that names no cache; "
            "no further line means that no call took it"
        )
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
    say(line)
    sys.stdout.flush()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and exec would pass that on
    os.execvpe(command[0], command, env)


def start() -> None:
    """Make the strategy of the environment, if any, this process's default; report at exit."""
    spec = os.environ.get(STRATEGY)
    if not spec:
        return
    try:
        parse(spec)
        if missing := compat.problems():
            raise SpecError(f"transformers {transformers.__version__} has no {', '.join(missing)}")
    except KvplugError as e:
        say(f"{e}: generate calls of {sys.executable} are left to transformers")
        return
    calls = default(spec)
    atexit.register(report, spec, calls)
    os.register_at_fork(after_in_child=calls.clear)  # a forked child counts its own


def default(spec: str) -> Counter[tuple[str, str]]:
    """Have `generate` calls without a cache of their own take `spec`, above `hook`'s methods.

    Returns what will have happened: how often, by (model class, why not, "" where it was taken).
    """
    calls: Counter[tuple[str, str]] = Counter()
    hooked, lock = getattr(GenerationMixin, compat.PREPARE), threading.Lock()
    signature = inspect.signature(hooked)

    def count(model: GenerationMixin, why_not: str = "") -> None:
        key = (type(model).__name__, why_not)
        with lock:
            calls[key] += 1
            first = calls[key] == 1
        if first:
            say(f"{key[0]} " + (f"is left alone: {why_not}" if why_not else f"takes {spec}"))

    @functools.wraps(hooked)
    def prepare(self: GenerationMixin, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        config, model_kwargs = (call.arguments[x] for x in ("generation_config", "model_kwargs"))
        if why_not := _own(config, model_kwargs):
            count(self, why_not)
            return hooked(self, *args, **kwargs)
        named = copy.copy(config)  # the caller's object may be shared between threads
        named.cache_implementation = spec
        call.arguments["generation_config"] = named
        try:
            result = hooked(*call.args, **call.kwargs)
        except KvplugError as e:
            count(self, str(e))
            return hooked(self, *args, **kwargs)
        count(self)
        return result

    setattr(GenerationMixin, compat.PREPARE, prepare)
    return calls


def _own(config: GenerationConfig, model_kwargs: dict) -> str:
    """Why a call is left alone, "" if it is not."""
    if config.is_assistant:
        return "it assists another model"
    if config.cache_implementation is not None:
        return f"the call names {config.cache_implementation!r}"
    if (given := _cache_in(model_kwargs)) is not None:
        return f"the call passes a {type(given).__name__}"
    return "the call says use_cache=False" if config.use_cache is False else ""


def report(spec: str, calls: Counter[tuple[str, str]]) -> None:
    """Say at exit how many calls took the strategy; a process below the first only if any came."""
    taken = sum(n for (_, why_not), n in calls.items() if not why_not)
    if calls:
        left = [f"{n} of {model}: {why}" for (model, why), n in calls.items() if why]
        say(
            f"{taken} of {calls.total()} generate calls took {spec}"
            + ("; left alone: " + "; ".join(left) if left else "")
        )
    elif os.environ[PROCESS] == str(os.getpid()):
        say(f"no generate call, so nothing took {spec}")


def say(text: str) -> None:
    """One line on stderr; processes below the first give their number."""
    first = os.environ.get(PROCESS, str(os.getpid())) == str(os.getpid())
    print(f"kvplug run{'' if first else f' [{os.getpid()}]'}: {text}", file=sys.stderr, flush=True)
