"""What a process has once: the kernel, compiled or from disk, and the threads it runs on."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING

import numba
import torch
from numba import njit

from . import encode
from .arguments import SIGNATURE
from .attend import attend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

logger = logging.getLogger("kvplug")

COMPILING = (
    "kvplug: compiling the CPU kernel: some 40 seconds, once per machine; "
    "`kvplug warmup` does it ahead of time"
)
ALONE = (
    "kvplug: this process was forked from one whose CPU kernel had started its threads: it goes on "
    "with one thread. Processes started by 'spawn' or 'forkserver', or forked before, have all"
)

# Numba's own thread pool, its choice where OpenMP is not there, ends the process when two threads
# use it at once; and two calls that share the cores gain nothing
ONE_AT_A_TIME = threading.Lock()
AS_IT_IS = nullcontext()

_forked = False  # whether the threads of the pool were left behind in another process


# what is compiled, each for these arguments alone
SIGNATURES = {
    attend: SIGNATURE,
    encode.encode_keys: encode.KEYS,
    encode.encode_values: encode.VALUES,
}


@cache
def compiled(function: FunctionType) -> Callable:
    """One of SIGNATURES, compiled: from disk, or compiled now, which is said."""
    way = "alone" if _forked else "in_parallel"
    kernel = njit(parallel=not _forked, nogil=True, cache=True, error_model="numpy")(
        _named(f"{function.__name__}_{way}_{sources()}", function)
    )
    threads = torch.get_num_threads()
    if not numba.config.DISABLE_JIT:
        notice = threading.Timer(2.0, logger.warning, (COMPILING,))
        notice.start()
        try:
            kernel.compile(SIGNATURES[function])
        finally:
            notice.cancel()
    if _forked:
        _say_alone()
        return kernel
    numba.get_num_threads()  # starts Numba's pool, if compiling did not, ...
    torch.set_num_threads(threads)  # ... which sets the number of threads for all of OpenMP
    return kernel


@cache
def _say_alone() -> None:
    logger.warning(ALONE)


def sources(folder: Path = Path(__file__).parent) -> str:
    """What names all that the kernel is made of, by content."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def _named(name: str, function: FunctionType) -> FunctionType:
    """A copy of a function under another name.

    Numba keeps compiled code by the name of a function and the time stamp of its file. Neither
    tells one of these kernels from another: that without threads is made of the same function, and
    most of what is compiled stands in other files. So the name says both.
    """
    code = function.__code__.replace(co_name=name, co_qualname=name)
    return FunctionType(code, function.__globals__)


def _after_fork() -> None:
    """Go on in a child without the threads that only its parent has.

    GNU OpenMP, the pool of Numba and of torch, does not start them anew: Numba would end the child,
    torch would wait for ever.
    """
    global ONE_AT_A_TIME, _forked
    ONE_AT_A_TIME = threading.Lock()  # a thread of the parent may hold the other
    if compiled.cache_info().currsize:
        _forked = True
        compiled.cache_clear()
        _say_alone.cache_clear()
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def threads(n: int) -> AbstractContextManager[None]:
    """As many threads as torch uses: its OpenMP pool is Numba's too, and keeps its size."""
    return AS_IT_IS if _forked or n == numba.get_num_threads() else _set_threads(n)


@contextmanager
def _set_threads(n: int) -> Iterator[None]:
    before = numba.get_num_threads()
    numba.set_num_threads(min(n, numba.config.NUMBA_NUM_THREADS))
    try:
        yield
    finally:
        numba.set_num_threads(before)
