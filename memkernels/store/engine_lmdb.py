"""LMDB as the engine of a log: one environment a process and file, a huge sparse map, no long-lived readers."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb

from memkernels.store import disk, lmdb_pages
from memkernels.store.errors import StoreError, StoreFormatError

_MAP = 1 << 40  # bytes of address space; the file is as long as its pages
_LOCK = 8192  # of the lock file: 126 readers of 64 bytes, and 128
_shared: dict[tuple[int, int, int], Shared] = {}
_left: list[Shared] = []  # of a parent process
_lock = threading.RLock()
_ended = threading.Condition(_lock)  # of a transaction


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (lmdb.CorruptedError, lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.PageNotFoundError, lmdb.PanicError) as error:
        raise StoreFormatError(f"store: {path} is damaged: {error}") from error
    except lmdb.Error as error:
        raise StoreError(f"store: {path}: {error}") from error


class Shared:
    """The one environment of this process on a file: LMDB must not open a file twice."""

    def __init__(self, path: Path, write: bool, sync: bool) -> None:
        self.path, self.users, self.write, self.sync = path, 0, write, sync
        self.reading = self.writing = 0  # transactions
        self.environment = self._open()

    def _open(self) -> Any:
        writable = os.access(self.path.parent, os.W_OK)
        if writable:
            disk.allocate(self.path.with_name(f"{self.path.name}-lock"), _LOCK)
        with _errors(self.path):
            return lmdb.open(
                os.fsencode(self.path),
                map_size=_MAP,
                subdir=False,
                readonly=not self.write,
                lock=writable,  # without it nobody else can write either
                sync=self.sync,
                readahead=True,
                create=self.write,
                max_spare_txns=0,  # one that is kept holds a place in the table of readers, which a forked child would give up
            )

    def reopen(self, write: bool, sync: bool) -> None:
        """For a user who needs more than the others."""
        if (write and not self.write) or (write and sync != self.sync):
            self.environment.close()
            self.write, self.sync = self.write or write, sync
            self.environment = self._open()


def _before_fork() -> None:
    """Waits for writes of other threads to end, and lets none begin until the fork is over."""
    _lock.acquire()
    _ended.wait_for(lambda: not any(shared.writing for shared in _shared.values()), timeout=10)


def _after_fork() -> None:
    """In the child. Closing an environment takes from the parent the snapshots that were open: then it is left, and not usable."""
    global _lock, _ended
    _lock = threading.RLock()
    _ended = threading.Condition(_lock)
    for shared in _shared.values():
        if not (shared.reading or shared.writing):
            shared.environment.close()
        else:
            _left.append(shared)
    _shared.clear()


os.register_at_fork(before=_before_fork, after_in_parent=lambda: _lock.release(), after_in_child=_after_fork)


class LmdbTransaction:
    def __init__(self, path: Path, shared: Shared, write: bool) -> None:
        self._path, self._shared, self._write, self._ended = path, shared, write, False
        with _errors(path):
            self._transaction = shared.environment.begin(write=write)
        self._count(1)

    def _count(self, by: int) -> None:
        if self._write:
            self._shared.writing += by
        else:
            self._shared.reading += by

    def _end(self) -> None:
        with _lock:
            if not self._ended:
                self._ended = True
                self._count(-1)
                _ended.notify_all()

    def get(self, key: bytes) -> bytes | None:
        with _errors(self._path):
            return self._transaction.get(key)

    def put(self, key: bytes, value: bytes) -> None:
        with _errors(self._path):
            self._transaction.put(key, value)

    def delete(self, key: bytes) -> None:
        with _errors(self._path):
            self._transaction.delete(key)

    def scan(self, prefix: bytes, after: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Entries of a prefix behind a key, in order."""
        with _errors(self._path):
            cursor = self._transaction.cursor()
            more = cursor.set_range(max(after, prefix))
            if more and cursor.key() == after:
                more = cursor.next()
            while more and cursor.key().startswith(prefix):
                yield cursor.item()
                more = cursor.next()

    def commit(self) -> None:
        try:
            with _errors(self._path):
                self._transaction.commit()
        finally:
            self._end()

    def abort(self) -> None:
        self._transaction.abort()
        self._end()


class LmdbEngine:
    def __init__(self, path: Path, write: bool, sync: bool, create: bool) -> None:
        self.path, self._pid = path, os.getpid()
        if create:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666))
        found = os.stat(path)
        self._key = (self._pid, found.st_dev, found.st_ino)
        with _lock:
            shared = _shared.get(self._key)
            if shared is None:
                if not create:
                    lmdb_pages.check(path)
                shared = _shared[self._key] = Shared(path, write, sync)
            else:
                shared.reopen(write, sync)
            shared.users += 1
            self._shared: Shared | None = shared

    def begin(self, write: bool) -> LmdbTransaction:
        with _lock:
            if self._shared is None:
                raise StoreError(f"store: {self.path} is closed")
            return LmdbTransaction(self.path, self._shared, write)

    def verify(self) -> list[str]:
        try:
            lmdb_pages.check(self.path)
        except StoreError as error:
            return [str(error)]
        return []

    def close(self) -> None:
        with _lock:
            shared, self._shared = self._shared, None
            if shared is None:
                return
            if self._pid != os.getpid():
                return
            shared.users -= 1
            if not shared.users:
                del _shared[self._key]
                shared.environment.close()
