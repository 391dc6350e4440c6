"""Python's sqlite3 as the engine of a log: one table, a write-ahead log, synchronous=FULL."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from memkernels.store.errors import StoreError, StoreFormatError

_TABLE = "CREATE TABLE map (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"
_BUSY = 10.0  # seconds to wait for a reader that recovers or a checkpoint
_inherited: list[sqlite3.Connection] = []  # of a parent process: closing them here would harm it
_calls = 0  # under way, in all threads
_change = threading.Condition(threading.RLock())


def _before_fork() -> None:
    """Waits for calls of other threads to end: a lock of SQLite's own that one of them held would never be free in the child."""
    _change.acquire()
    _change.wait_for(lambda: not _calls, timeout=10)


def _after_fork() -> None:
    global _calls, _change
    _calls, _change = 0, threading.Condition(threading.RLock())


os.register_at_fork(before=_before_fork, after_in_parent=lambda: _change.release(), after_in_child=_after_fork)


def _count(by: int) -> None:
    global _calls
    with _change:
        _calls += by
        if not _calls:
            _change.notify_all()


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Around every call of SQLite."""
    _count(1)
    try:
        yield
    except sqlite3.OperationalError as error:
        if "malformed" in str(error) or "unsupported file format" in str(error):
            raise StoreFormatError(f"store: {path} is damaged: {error}") from error
        raise StoreError(f"store: {path}: {error}") from error
    except sqlite3.DatabaseError as error:
        raise StoreFormatError(f"store: {path} is damaged: {error}") from error
    finally:
        _count(-1)


class SqliteTransaction:
    def __init__(self, engine: SqliteEngine, connection: sqlite3.Connection, write: bool) -> None:
        self._engine, self._connection = engine, connection
        with _errors(engine.path):
            connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()  # the snapshot begins with the first read

    def get(self, key: bytes) -> bytes | None:
        with _errors(self._engine.path):
            row = self._connection.execute("SELECT value FROM map WHERE key = ?", (key,)).fetchone()
            return None if row is None else self._blob(row[0])

    def put(self, key: bytes, value: bytes) -> None:
        with _errors(self._engine.path):
            self._connection.execute("INSERT OR REPLACE INTO map VALUES (?, ?)", (key, value))

    def delete(self, key: bytes) -> None:
        with _errors(self._engine.path):
            self._connection.execute("DELETE FROM map WHERE key = ?", (key,))

    def scan(self, prefix: bytes, after: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Entries of a prefix behind a key, in order."""
        while True:
            with _errors(self._engine.path):
                query = "SELECT key, value FROM map WHERE key > ? AND key < ? ORDER BY key LIMIT 1"
                row = self._connection.execute(query, (max(after, prefix), prefix + b"\xff" * 16)).fetchone()
            if row is None:
                return
            after = self._blob(row[0])
            yield after, self._blob(row[1])

    def _blob(self, value: object) -> bytes:
        if not isinstance(value, bytes):
            raise StoreFormatError(f"store: {self._engine.path} is damaged: an entry is not a blob")
        return value

    def commit(self) -> None:
        try:
            with _errors(self._engine.path):
                self._connection.execute("COMMIT")
        except BaseException:
            self._engine.end(self._connection)  # the transaction may be open still, and lock the file for as long as the error is kept
            raise
        self._engine.give_back(self._connection)

    def abort(self) -> None:
        try:
            with _errors(self._engine.path):
                self._connection.execute("ROLLBACK")
        except StoreError:
            self._engine.end(self._connection)  # e.g. rolled back already, after a full disk
        else:
            self._engine.give_back(self._connection)


class SqliteEngine:
    def __init__(self, path: Path, write: bool, sync: bool, create: bool) -> None:
        self.path, self._write, self._sync = path, write, sync
        self._idle: list[sqlite3.Connection] = []
        self._lock, self._pid = threading.Lock(), os.getpid()
        connection = self._connect(create)
        try:
            with _errors(path):
                self._check(connection, create)
        except BaseException:
            self.end(connection)
            raise
        self.give_back(connection)

    def _connect(self, create: bool = False) -> sqlite3.Connection:
        writable = os.access(self.path.parent, os.W_OK)  # a reader too keeps the table of the write-ahead log
        log = self.path.with_name(f"{self.path.name}-wal")  # without one, or with an empty one, the file has it all
        still = not writable and not (log.exists() and log.stat().st_size)
        mode = "rwc" if create else "rw" if writable else "ro&immutable=1" if still else "ro"
        with _errors(self.path):
            uri = f"{self.path.absolute().as_uri()}?mode={mode}"
            connection = sqlite3.connect(uri, uri=True, timeout=_BUSY, isolation_level=None, check_same_thread=False)
        try:
            with _errors(self.path):
                for pragma in ("trusted_schema=OFF", "cell_size_check=ON", "mmap_size=0", "secure_delete=ON"):
                    connection.execute(f"PRAGMA {pragma}")
                if self._write:
                    connection.execute("PRAGMA journal_mode=WAL")
                    connection.execute(f"PRAGMA synchronous={'FULL' if self._sync else 'OFF'}")
                else:
                    connection.execute("PRAGMA query_only=ON")
        except BaseException:
            self.end(connection)
            raise
        return connection

    def _check(self, connection: sqlite3.Connection, create: bool) -> None:
        if create:
            connection.execute(_TABLE)
        found = connection.execute("SELECT type, name, sql FROM sqlite_master LIMIT 3").fetchall()
        if found != [("table", "map", _TABLE)]:
            raise StoreFormatError(f"store: {self.path} is damaged or not part of a store: its tables are {found!r:.200}")

    def begin(self, write: bool) -> SqliteTransaction:
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        connection = connection or self._connect()
        try:
            return SqliteTransaction(self, connection, write)
        except BaseException:
            self.end(connection)
            raise

    def end(self, connection: sqlite3.Connection) -> None:
        with _errors(self.path):
            connection.close()

    def give_back(self, connection: sqlite3.Connection) -> None:
        if not os.access(self.path.parent, os.W_OK):  # the next one may find a write-ahead log
            return self.end(connection)
        with self._lock:
            self._idle.append(connection)

    def verify(self) -> list[str]:
        connection = self._connect()
        try:
            with _errors(self.path):
                return [row[0] for row in connection.execute("PRAGMA integrity_check").fetchall() if row[0] != "ok"]
        finally:
            self.end(connection)

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        if self._pid != os.getpid():
            _inherited.extend(idle)
            return
        for connection in idle:
            self.end(connection)
