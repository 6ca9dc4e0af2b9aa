"""`s3://`, `gs://`, ...: records as objects wherever fsspec reaches."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar

import fsspec

from ..errors import MissingExtra, StoreError
from .backend import Backend, Entry
from .record import LARGEST

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

SUFFIX = ".kv"
AT_ONCE = 4  # records fetched side by side where the file system can


class Remote(Backend):
    """What bounds its records, and when they end, is set there: lifecycle rules of the bucket.

    `URL/TENANT/KEY.kv`. Object stores show a whole object or none; elsewhere a torn record fails
    its checksum.
    """

    atomic: ClassVar[bool] = False

    def __init__(self, url: str) -> None:
        try:
            self._fs, root = fsspec.url_to_fs(url, use_listings_cache=False)
        except ImportError as e:  # fsspec says which package has the scheme
            raise MissingExtra(f"a store at {url.partition(':')[0]}://: {e}") from e
        except ValueError as e:
            raise StoreError(f"fsspec cannot read this URL: {e}") from e
        self._root = root.rstrip("/")

    def get_many(self, keys: Sequence[bytes]) -> Iterator[bytes]:
        for i in range(0, len(keys), AT_ONCE):
            paths = [self._path(key) for key in keys[i : i + AT_ONCE]]
            found = self._fs.cat_ranges(
                paths, [0] * len(paths), [LARGEST] * len(paths), on_error="return"
            )
            for record in found:
                if isinstance(record, FileNotFoundError):
                    return
                if isinstance(record, Exception):
                    raise record
                yield record

    def has_many(self, keys: Sequence[bytes]) -> int:
        missing = (n for n, key in enumerate(keys) if not self._fs.exists(self._path(key)))
        return next(missing, len(keys))

    def put_many(self, items: Sequence[tuple[bytes, bytes]], after: Sequence[bytes] = ()) -> None:
        for key, record in items:
            path = self._path(key)
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)  # nothing on object stores
            self._fs.pipe_file(path, record)

    def delete(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._path(key))

    def entries(self) -> Iterator[Entry]:
        for path, about in self._fs.find(self._root, detail=True).items():
            tenant, _, name = path.removesuffix(SUFFIX).rpartition("/")
            with suppress(ValueError):  # not ours
                key = bytes.fromhex(tenant.rpartition("/")[2] + name)
                if len(key) == 32 and path.endswith(SUFFIX):
                    yield Entry(key, about["size"])

    def _path(self, key: bytes) -> str:
        return f"{self._root}/{key[:8].hex()}/{key[8:].hex()}{SUFFIX}"
