"""Reading ahead: what an iterator gives next is made in threads while the caller works."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from concurrent.futures import Future

T = TypeVar("T")
U = TypeVar("U")
_END = object()


def ahead(source: Generator[T], work: Callable[[T], U], depth: int) -> Iterator[U]:
    """`work` of what `source` yields, in order, up to `depth` items before they are asked for.

    `source` runs in one thread, one item after the other, `work` in as many as items are made
    ahead. What either raises is raised here, in its place. Closing this closes `source`.
    """

    def worked(item: Future) -> U:
        got = item.result()
        return got if got is _END else work(got)

    with (
        ThreadPoolExecutor(1, "kvplug-store") as one,
        ThreadPoolExecutor(depth, "kvplug-store") as several,
    ):

        def begin() -> Future:
            return several.submit(worked, one.submit(next, source, _END))

        waiting = deque(begin() for _ in range(depth))
        try:
            while (item := waiting.popleft().result()) is not _END:
                waiting.append(begin())
                yield item
        finally:
            for future in waiting:
                future.cancel()
            one.submit(source.close)
