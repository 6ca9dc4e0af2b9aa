"""Which records a store holds and which go first: one SQLite table, in memory or beside files.

SQLite does what is hard about it: threads and processes that write at once, and writers that are
killed. The table may be lost at any time: who owns the records enters them anew.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from ..errors import StoreError, unknown
from .backend import Entry, Full

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

# what goes first: used longest ago; used least, and of these the one used longest ago
POLICIES = {"lru": "used", "lfu": "hits, used"}
VERSION = 1  # of the table
SCHEMA = (
    "CREATE TABLE records (key BLOB PRIMARY KEY, size INTEGER, created REAL, expires REAL,"
    " used INTEGER, hits INTEGER, pinned INTEGER)",
    "CREATE INDEX by_use ON records (used)",
    "CREATE INDEX by_hits ON records (hits, used)",
    "CREATE INDEX by_end ON records (expires)",
    "CREATE TABLE sums (bytes INTEGER)",
    "INSERT INTO sums VALUES (0)",
    "CREATE TRIGGER more AFTER INSERT ON records"
    " BEGIN UPDATE sums SET bytes = bytes + NEW.size; END",
    "CREATE TRIGGER less AFTER DELETE ON records"
    " BEGIN UPDATE sums SET bytes = bytes - OLD.size; END",
    f"PRAGMA user_version = {VERSION}",
)
WAIT = 2.0  # seconds for another writer, who needs milliseconds
YOUNG = 60.0  # seconds in which a record that is entered may still be on its way to the disk
IN_MEMORY = ":memory:"

_inherited: list[sqlite3.Connection] = []  # of a parent process: to be neither used nor closed


class Index:
    """Keys with size, age, use and pins, within a bound.

    Args:
        path: of the file; IN_MEMORY for none.
        max_bytes: bound of all records together; None: no bound.
        policy: which goes first, "lru" or "lfu".
        ttl: seconds until a record ends that this index enters; None: never.
        there: (key, size, created) of the records that a new index has to begin with.

    Raises StoreError for a policy that nothing has, and for numbers below 0.
    """

    def __init__(
        self,
        path: str = IN_MEMORY,
        max_bytes: int | None = None,
        policy: str = "lru",
        ttl: float | None = None,
        there: Callable[[], Iterable[tuple[bytes, int, float]]] = lambda: (),
    ) -> None:
        if policy not in POLICIES:
            raise StoreError(unknown("policy", policy, sorted(POLICIES)))
        self.path, self.max_bytes, self.ttl = path, max_bytes, ttl
        self.evicted = 0
        self._order, self._there = POLICIES[policy], there
        self._lock = threading.RLock()
        self._db: sqlite3.Connection | None = None
        self._file: tuple[int, ...] | None = None

    def use(self, keys: Sequence[bytes]) -> int:
        """How many of the first of `keys` are there; these are now the last used."""
        with self._transaction() as db:
            n = self._count(db, keys)
            self._touch(db, keys[:n], hits=1)
        return n

    def count(self, keys: Sequence[bytes]) -> int:
        """How many of the first of `keys` are there."""
        with self._transaction() as db:
            return self._count(db, keys)

    def reserve(
        self,
        sizes: dict[bytes, int],
        after: Sequence[bytes],
        drop: Callable[[list[bytes]], None],
    ) -> None:
        """Enter keys, which are now the last used, when others have made room for them.

        Args:
            sizes: bytes by key, in the order of a chain.
            after: keys of this chain before them.
            drop: called with the keys that go, or are written anew, while no other writer can
                enter one.

        Raises Full, and changes nothing, where they do not fit beside what is pinned and `after`.
        """
        now = time.time()
        with self._transaction() as db:
            old = {key: row for key in sizes if (row := self._row(db, "hits, pinned", key))}
            db.executemany("DELETE FROM records WHERE key = ?", [(key,) for key in old])
            gone = self._make_room(db, sum(sizes.values()), {*after, *sizes}, now)
            expires = None if self.ttl is None else now + self.ttl
            db.executemany(
                "INSERT INTO records VALUES (?, ?, ?, ?, 0, ?, ?)",
                [(key, size, now, expires, *old.get(key, (0, 0))) for key, size in sizes.items()],
            )
            self._touch(db, [*after, *sizes])
            drop([*gone, *old])

    def settle(self, key: bytes, size: int, publish: Callable[[], None]) -> bool:
        """`publish` a record that `reserve` has entered, unless it had to go in between."""
        with self._transaction() as db:
            if self._row(db, "1", key, "AND size = ?", size) is None:
                return False
            publish()
        return True

    def lost(self, key: bytes) -> None:
        """Forget a record that was not found, unless it may be on its way."""
        with self._transaction() as db:
            old = time.time() - YOUNG
            db.execute("DELETE FROM records WHERE key = ? AND created < ?", (key, old))

    def forget(self, keys: Iterable[bytes], drop: Callable[[list[bytes]], None]) -> None:
        """Forget records, and `drop` them while no other writer can enter one."""
        keys = list(keys)
        with self._transaction() as db:
            db.executemany("DELETE FROM records WHERE key = ?", [(key,) for key in keys])
            drop(keys)

    def pin(self, keys: Iterable[bytes], pinned: bool) -> None:
        """Keep records from being dropped for others, or no longer."""
        with self._transaction() as db:
            db.executemany(
                "UPDATE records SET pinned = ? WHERE key = ?", [(pinned, key) for key in keys]
            )

    def entries(self) -> list[Entry]:
        """Every record that has not ended."""
        with self._transaction() as db:
            found = db.execute(
                "SELECT key, size, created, expires, hits, pinned FROM records"
                " WHERE expires IS NULL OR expires > ?",
                (time.time(),),
            )
            return [Entry(*row[:-1], bool(row[-1])) for row in found]

    def held(self) -> int:
        """Bytes of all records, those included that have ended and are still there."""
        with self._transaction() as db:
            return db.execute("SELECT bytes FROM sums").fetchone()[0]

    def _count(self, db: sqlite3.Connection, keys: Sequence[bytes]) -> int:
        alive, now = "AND (expires IS NULL OR expires > ?)", time.time()
        ended = (n for n, key in enumerate(keys) if self._row(db, "1", key, alive, now) is None)
        return next(ended, len(keys))

    def _touch(self, db: sqlite3.Connection, chain: Sequence[bytes], hits: int = 0) -> None:
        """The first of a chain is the last used: without it the others are of no use."""
        (last,) = db.execute("SELECT coalesce(max(used), 0) FROM records").fetchone()
        db.executemany(
            "UPDATE records SET used = ?, hits = hits + ? WHERE key = ?",
            [(last + len(chain) - i, hits, key) for i, key in enumerate(chain)],
        )

    def _make_room(
        self, db: sqlite3.Connection, need: int, spared: set[bytes], now: float
    ) -> list[bytes]:
        """Keys taken out so that `need` bytes fit: first what has ended, then as the policy says.

        Raises Full where it is not enough.
        """
        gone = db.execute("SELECT key FROM records WHERE expires <= ?", (now,)).fetchall()
        db.executemany("DELETE FROM records WHERE key = ?", gone)
        if self.max_bytes is not None:
            (held,) = db.execute("SELECT bytes FROM sums").fetchone()
            surplus, evicted = held + need - self.max_bytes, []
            rows = db.execute(
                f"SELECT key, size FROM records WHERE NOT pinned ORDER BY {self._order}"
            )
            while surplus > 0 and (row := rows.fetchone()) is not None:
                if row[0] not in spared:
                    evicted.append(row[:1])
                    surplus -= row[1]
            if surplus > 0:
                raise Full(
                    f"{need} bytes do not fit into max_bytes={self.max_bytes} beside what is "
                    "pinned and the chunks before: give the store more"
                )
            db.executemany("DELETE FROM records WHERE key = ?", evicted)
            self.evicted += len(evicted)
            gone += evicted
        return [key for (key,) in gone]

    @staticmethod
    def _row(
        db: sqlite3.Connection, what: str, key: bytes, where: str = "", *values: float
    ) -> tuple | None:
        return db.execute(
            f"SELECT {what} FROM records WHERE key = ? {where}", (key, *values)
        ).fetchone()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing, and nobody else in between. A damaged file is thrown away."""
        with self._lock:
            try:
                db = self._connect()
                db.execute("BEGIN IMMEDIATE")
                try:
                    yield db
                    db.execute("COMMIT")
                except BaseException:
                    with suppress(sqlite3.Error):
                        db.execute("ROLLBACK")
                    raise
            except sqlite3.DatabaseError as e:
                if type(e) is sqlite3.DatabaseError:  # malformed; those below it are not
                    self._throw_away()
                raise

    def _connect(self) -> sqlite3.Connection:
        """The connection, made anew after a fork and where the file is not the one it was."""
        if self._db is not None and self._file == self._identity():
            return self._db
        if self._db is not None:
            if self._file and self._file[0] != os.getpid():
                _inherited.append(self._db)
            else:
                self._db.close()
        self._db = sqlite3.connect(
            self.path, timeout=WAIT, isolation_level=None, check_same_thread=False
        )
        end = time.monotonic() + WAIT
        while True:  # SQLite does not wait by itself while several processes make one file
            try:
                self._prepare(self._db)
                break
            except sqlite3.OperationalError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)
        self._file = self._identity()
        return self._db

    def _prepare(self, db: sqlite3.Connection) -> None:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = OFF")  # what a power cut damages is made anew
        if self._version(db) == VERSION:
            return
        db.execute("BEGIN IMMEDIATE")
        try:
            if (version := self._version(db)) not in (0, VERSION):
                raise sqlite3.DatabaseError(f"index of version {version}, not {VERSION}")
            if version == 0:
                for statement in SCHEMA:
                    db.execute(statement)
                db.executemany("INSERT INTO records VALUES (?, ?, ?, NULL, 0, 0, 0)", self._there())
            db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            raise

    @staticmethod
    def _version(db: sqlite3.Connection) -> int:
        return db.execute("PRAGMA user_version").fetchone()[0]

    def _identity(self) -> tuple[int, ...] | None:
        """This process and the file; None where the file is gone."""
        if self.path == IN_MEMORY:
            return (0,)
        try:
            stat = os.stat(self.path)
        except FileNotFoundError:
            return None
        return os.getpid(), stat.st_dev, stat.st_ino

    def _throw_away(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None
        for end in ("", "-wal", "-shm"):
            with suppress(OSError):
                os.unlink(self.path + end)
