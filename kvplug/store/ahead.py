"""Reading ahead: what an iterator gives next is made in a thread while the caller works."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

T = TypeVar("T")
_END = object()


def ahead(source: Generator[T], depth: int) -> Iterator[T]:
    """What `source` yields, up to `depth` items before they are asked for.

    `source` runs in one thread, one item after the other; what it raises is raised here, in its
    place. Closing this closes `source`.
    """
    with ThreadPoolExecutor(1, "kvplug-store") as pool:
        waiting = deque(pool.submit(next, source, _END) for _ in range(depth))
        try:
            while (item := waiting.popleft().result()) is not _END:
                waiting.append(pool.submit(next, source, _END))
                yield item
        finally:
            for future in waiting:
                future.cancel()
            pool.submit(source.close)
