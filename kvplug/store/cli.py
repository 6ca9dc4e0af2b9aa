"""`kvplug store stat|ls|verify|clear URL`: what a store holds, without a model."""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

from ..errors import KvplugError
from ..units import text_of
from . import keys
from .store import Store

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

VERBS = {
    "stat": "how many records and bytes, in all and by tenant",
    "ls": "each record: tenant, key, bytes, seconds since it was written, reads, pinned",
    "verify": "read all and forget what is bad; 1 where something was",
    "clear": "forget all records, or those of one salt",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What comes behind `kvplug store`."""
    parser.add_argument(
        "verb", choices=VERBS, help="; ".join(f"{name}: {what}" for name, what in VERBS.items())
    )
    parser.add_argument("url", help="memory of other processes cannot be looked into")
    parser.add_argument("--salt", help="only the records of this salt (default: all)")


def run(args: argparse.Namespace) -> int:
    """0 where it worked, 1 where `verify` found what is bad, 2 where the store cannot be read."""
    store = Store(args.url)
    verbs: dict[str, Callable[[Store, str | None], int]]
    verbs = {"stat": _stat, "ls": _ls, "verify": _verify, "clear": _clear}
    try:
        return verbs[args.verb](store, args.salt)
    except (KvplugError, BrokenPipeError):
        raise
    except Exception as e:  # whatever the engine raises
        print(f"kvplug: {store.url} cannot be read: {type(e).__name__}: {e}", file=sys.stderr)
        return 2


def _stat(store: Store, salt: str | None) -> int:
    records: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for e in store.entries(salt):
        tenant = e.key[: keys.TAG].hex()
        records[tenant] += 1
        sizes[tenant] += e.size
    print(f"{store.url}: {records.total()} records, {text_of(sizes.total())}")
    for tenant, n in sorted(records.items()):
        print(f"  tenant {tenant}: {n} records, {text_of(sizes[tenant])}")
    return 0


def _ls(store: Store, salt: str | None) -> int:
    for e in sorted(store.entries(salt)):
        age = "-" if e.created is None else f"{time.time() - e.created:.0f}"
        hits = "-" if e.hits is None else e.hits
        tenant, key = e.key[: keys.TAG].hex(), e.key[keys.TAG :].hex()
        pinned = " pinned" if e.pinned else ""
        print(f"{tenant} {key} {e.size:>12} {age:>9} {hits:>6}{pinned}")
    return 0


def _verify(store: Store, salt: str | None) -> int:
    found = store.verify(salt)
    bad = found.total() - found["good"]
    why = ", ".join(f"{n} {reason}" for reason, n in sorted(found.items()) if reason != "good")
    print(f"{found['good']} records are good, {bad} were not" + (f" ({why})" if bad else ""))
    return 1 if bad else 0


def _clear(store: Store, salt: str | None) -> int:
    print(f"{store.clear(salt)} records forgotten")
    return 0
