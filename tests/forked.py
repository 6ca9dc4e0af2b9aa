"""Work done in a child made by fork: seconds faster than a new Python, and itself to be tested."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import traceback
import warnings
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable


def start(work: Callable[[], object]) -> tuple[int, int]:
    """A child made by fork that does `work`: its number, and a pipe for what that returns, as text.

    It exits with 0, or with 1 where `work` raises: then the text is what it raised.
    """
    if not hasattr(os, "fork"):
        pytest.skip("this system does not fork")
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: of threads that are idle
        child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            try:
                text, code = str(work()), 0
            except BaseException:
                text = traceback.format_exc()
            os.write(writer, text.encode()[:60_000])  # what a pipe holds
        os._exit(code)
    os.close(writer)
    return child, reader


def forked(work: Callable[[], object], seconds: int = 120) -> tuple[int, str]:
    """How a child ended that did `work`, as `subprocess` says it, and what that returned as text.

    Fails where the child does not end in time, or raises: with what it raised.
    """
    return ended(*start(work), seconds)


def ended(child: int, reader: int, seconds: int = 120) -> tuple[int, str]:
    """The same of a child that `start` made."""
    try:
        in_time = select.select([reader], [], [], seconds)[0]
        text = os.read(reader, 1 << 16).decode() if in_time else ""
    finally:
        os.close(reader)
    if not in_time:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not in_time:
        pytest.fail(f"the child has not ended after {seconds} s")
    if code == 1:
        pytest.fail(f"in the child: {text}")
    return code, text
