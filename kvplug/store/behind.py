"""Writing behind: what the caller need not wait for runs in a thread while it works."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def behind(work: Callable[..., Any], depth: int) -> Iterator[Callable[..., None]]:
    """A function that has calls of `work` run in one thread, in order; at the end all have run.

    Not more than `depth` calls wait, so that what they hold does not grow: the next one waits for
    the first of them; 0: each runs at once, and no thread is made. What a call raises is raised
    here.
    """
    if not depth:
        yield work
        return
    with ThreadPoolExecutor(1, "kvplug-store") as pool:
        waiting: deque[Future] = deque()

        def later(*args: Any, **kwargs: Any) -> None:
            if len(waiting) == depth:
                waiting.popleft().result()
            waiting.append(pool.submit(work, *args, **kwargs))

        yield later
        for future in waiting:
            future.result()
