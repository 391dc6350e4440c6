"""The log of a store on disk: rows in append-only segments, keys and commits in a small transactional engine.

A commit writes segments, syncs them, then commits one engine transaction with the keys, the checksums of the rows and the new state. A
small one goes to the journal first, with one sync, and with many others to segments and engine later. What neither names does not exist.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from memkernels.store import catalog, copies, disk, folder, journal
from memkernels.store.engine import default_engine, engine_files
from memkernels.store.errors import StoreError, StoreFormatError
from memkernels.store.format import HEADER, Layout, Marker, Schema, State, damaged
from memkernels.store.group import Group
from memkernels.store.journal import Journal
from memkernels.store.keys import KeyBatch
from memkernels.store.runs import Run
from memkernels.store.segments import Chunk
from memkernels.store.tail import Tail
from memkernels.store.view import Changes, View

__all__ = ["Changes", "Chunk", "KeyBatch", "Log", "Schema", "StoreError", "StoreFormatError"]
DURABILITY = ("none", "async", "commit")
SEGMENT = 1 << 30  # bytes of a segment, about
_logs: weakref.WeakSet[Log] = weakref.WeakSet()
Item = tuple[list[Run], int]  # what a commit adds: its runs, and how many rows there are then


class Log(View):
    """One writer, or one of many readers with a snapshot that `refresh` moves on. Thread-safe. See `create` and `open`."""

    def __init__(self, path: Path, mode: str, durability: str) -> None:
        super().__init__(path, mode)
        if durability not in DURABILITY:
            raise ValueError(f"store: durability: expected {', '.join(DURABILITY)}, got {durability!r}")
        self.durability = durability
        self._group: Group | None = None
        self._failed: BaseException | None = None
        self._given = 0  # number of the last commit that was asked for
        self._journal: Journal | None = None
        self._waiting: list[Item] = []  # commits that the journal holds and the engine does not

    @classmethod
    def exists(cls, path: str | os.PathLike[str]) -> bool:
        """Whether a store was created there."""
        return (Path(path) / "ENGINE").is_file()

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        schema: Schema,
        durability: str = "commit",
        engine: str | None = None,
        segment_bytes: int = SEGMENT,
    ) -> Log:
        """A new store in a directory that is empty or not there yet, opened to write. `engine`: "lmdb" (the default where it is
        installed) or "sqlite"."""
        self = cls(Path(path), "w", durability)
        name = engine or default_engine()
        capacity = max(1, (segment_bytes - HEADER) // Layout.of(schema).stride)
        try:
            with folder.creating(self.path) as self._lock_fd:
                state = State(0, 0, 0, capacity, 1, os.urandom(16))
                copies.new_engine(self.path, Marker(name, 1), schema, self._syncs(), lambda _: state)
                folder.write_marker(self.path, Marker(name, 1), self._syncs())
            if self._syncs():
                disk.sync_directory(self.path.absolute().parent)
            self._start()
        except BaseException:
            self._release()
            raise
        return self

    @classmethod
    def open(cls, path: str | os.PathLike[str], mode: str = "r", durability: str = "commit") -> Log:
        """An existing store; "w" for its one writer."""
        self = cls(Path(path), mode, durability)
        folder.read_marker(self.path)
        disk.refuse_network(self.path)
        self._lock_fd = folder.lock_writer(self.path) if mode == "w" else folder.lock_reader(self.path)
        try:
            self._start()
        except BaseException:
            self._release()
            raise
        return self

    def _syncs(self) -> bool:
        return self.durability != "none"

    def _start(self) -> None:
        self.closed = False
        self._load()
        folder.refuse_foreign(self.path, self._state)
        if self.mode == "w":
            catalog.seal(self._catalog.engine)
            self._recover()
            folder.remove_unused(self.path, self._marker, self._state)
            self._given = self._state.commit
            if self.durability == "async":
                self._group = Group()
            elif self.durability == "commit":
                self._journal = Journal(self.path)
        else:
            self._look().abort()
        _logs.add(self)

    def _recover_for_reader(self, commit: int) -> None:
        """The machine stopped after commits to the journal: a writer brings them to where they belong, if there is none already."""
        try:
            Log.open(self.path, "w").close()
        except (StoreError, OSError) as error:
            if isinstance(error, StoreFormatError) or not os.access(self.path, os.W_OK):
                raise
        else:
            if self._newest() == commit:
                raise damaged(journal.NAME, "its rows cannot be brought to the segments")

    def _recover(self) -> None:
        """Brings what the journal holds to segments and engine."""
        stride = self._segments.layout.stride
        records, missed = journal.read(self.path, self.schema, stride, self._state)
        if missed:
            raise damaged(journal.NAME, "commits are missing before its first one")
        items, rows = [], self._state.rows
        for record in records:
            for row, data in journal.blocks(record, stride):
                self._segments.write_block(row, data)
            rows += record.run.block_rows
            items.append(([record.run], rows))
        if items:
            self._write(items)
            self._tail = Tail(self._segments, rows)

    # Writing

    def append(self, keys: KeyBatch, values: dict[str, Tensor]) -> Tensor:
        """Row numbers int64 "n". Readable at once, durable and seen by others after `commit`. When it raises, as if not called."""
        with self._lock:
            self.check_write()
            self._check_batch(keys, values)
            first = self._tail.append(keys, values)
            return torch.arange(first, first + len(keys))

    def forget(self, keys: KeyBatch) -> None:
        """These keys are erased as of the next commit."""
        with self._lock:
            self.check_write()
            self._check_batch(keys, {})
            self._tail.forget(keys)

    def commit(self) -> int:
        """Its number. On return all before it is durable ("commit"), or will be soon ("async"), or is safe from this process only ("none").

        After an error of the disk the log refuses further writes: what the last fsync left on disk is known only to one who opens it anew.
        """
        with self._lock:
            self.check_write()
            if not self._tail.runs:
                return self._given
            item = self._tail.runs, self._tail.rows
            if self._group is not None:
                self._given += 1
                self._group.submit(self._write, item)
            else:
                self._write_now(item)
                self._given = self._state.commit
            self._tail.take()
            return self._given

    def _write_now(self, item: Item) -> None:
        record = self._record(item)
        if record is None or self._journal is None:
            self._write([*self._waiting, item])
            return
        if not self._journal.has_room(len(record)):
            self._settle()
        try:
            self._journal.write(record)
        except OSError:
            raise
        except BaseException as error:  # interrupted: it may have been written
            self._fail(error)
            raise
        try:
            self._journal.sync(record)
        except BaseException as error:
            self._fail(error)
            raise
        self._waiting.append(item)
        self._state = dataclasses.replace(self._state, commit=self._state.commit + 1, rows=item[1])

    def _record(self, item: Item) -> bytes | None:
        """A commit as the journal takes it, or None when it is too large for that."""
        runs, stride = item[0], self._segments.layout.stride
        run = runs[0]
        size = run.key_bytes + run.block_rows * stride
        if self._journal is None or len(runs) > 1 or size > journal.LARGEST:
            return None
        row, parts = run.first_row, []
        for rows, _ in run.blocks:
            parts.append(self._segments.read(row, rows))
            row += rows
        record = journal.encode(self._state, self._state.commit + 1, run, b"".join(parts))
        return record if len(record) <= 2 * journal.LARGEST else None

    def _settle(self) -> None:
        """The engine has every commit."""
        self.wait()
        if self._waiting and self._writes():
            self._check_failed()
            self._write(self._waiting)

    def wait(self) -> None:
        """Until all commits are durable; for durability "async"."""
        if self._group is not None and self._pid == os.getpid():
            self._group.wait()
            self._check_failed()

    def rollback(self) -> None:
        """Drops what was appended or forgotten since the last commit; its row numbers are given out again."""
        with self._lock:
            self.check_write()
            dropped = self._tail.take()
            self._tail.rows -= sum(run.block_rows for run in dropped)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """What is appended and forgotten inside, or nothing of it when something is raised there."""
        with self._lock:
            self.check_write(lock=False)
            mark = self._tail.mark()
            try:
                yield
            except BaseException:
                self._tail.back_to(mark)
                raise

    def _write(self, items: list[Item]) -> None:
        """Commits each of these, in one transaction. An error before its end can be tried again, one of a sync or of the end cannot."""
        try:
            if self._syncs():
                self._segments.sync()
        except BaseException as error:
            self._fail(error)
            raise
        try:
            folder.check_lock(self.path, self._lock_fd)
            prepared = self._catalog.prepare([runs for runs, _ in items], items[-1][1])
        except BaseException as error:
            if self._group is not None:  # nobody is there to try again
                self._fail(error)
            raise
        try:
            prepared.finish()
        except BaseException as error:
            self._fail(error)
            raise
        self._state, self._waiting = self._catalog.state, []
        if self._journal is not None:
            self._journal.clear()

    def refuse(self, error: BaseException) -> None:
        """No more writes: the caller does not know what is there."""
        self._failed = self._failed or error

    def _fail(self, error: BaseException) -> None:
        """No more writes. What the system still holds of the files may not be what the disk holds, and is not to be trusted either."""
        self._failed = error
        if self._engine is not None and not isinstance(error, (StoreFormatError, MemoryError)):
            self._engine.close()
            if self._marker.engine == "lmdb":
                disk.forget_cached(engine_files(self.path, "lmdb", self._marker.number)[0])
            for segment in self._segments.files:
                disk.forget_cached(segment.path)

    def rewrite(self, batches: Iterable[tuple[KeyBatch, dict[str, Tensor]]], erase: bool = False) -> None:
        """Replaces everything by these keys and values, in new files, in one step; then removes the old files (`erase`: overwrites them).

        Rows are numbered from 0 again: ask for `replay` and `chunks` anew. A reader goes on with the old files until its `refresh`; `erase`
        needs that there is none. When it raises before the step, nothing has changed.
        """
        with self._lock:
            self.check_write()
            self._settle()
            if self._tail.runs:
                raise StoreError("store: rewrite: commit or roll back first")
            copies.rewrite(self, batches, erase)

    def close(self) -> None:
        """Drops what was not committed, waits for commits in the background, lets the next writer in."""
        with self._lock:
            if self.closed:
                return
            try:
                if self._group is not None and self._pid == os.getpid():
                    self._group.stop()
                    self._check_failed()
                if self._writes() and self._failed is None:
                    self._settle()
                    copies.trim(self)
            finally:
                self._release()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "closed", True) and self._pid == os.getpid():
            if self._group is not None:
                self._group.let_go()
            self._release()

    def _release(self) -> None:
        self.closed = True
        if self._engine is not None:
            self._engine.close()
            self._engine = None
            self._segments.close()
        if self._journal is not None:
            self._journal.close(remove=False)
        if self._lock_fd is not None:
            disk.unlock(self._lock_fd)
            self._lock_fd = None

    # Checks

    def _check_failed(self) -> None:
        if self._failed is not None:
            raise StoreError(
                f"store: {self.path}: writing failed ({type(self._failed).__name__}: {self._failed}); nothing after commit"
                f" {self._state.commit} is known to be on disk: close the store and open it again"
            ) from self._failed

    def check_write(self, lock: bool = True) -> None:
        """Raises unless this log may be written to; `lock`: and has its lock still."""
        if self.closed:
            raise StoreError(f"store: {self.path} is closed")
        if self.mode != "w":
            raise StoreError(f"store: {self.path} is open for reading only")
        if self._pid != os.getpid():
            raise StoreError(f"store: {self.path} was opened to write by process {self._pid}; its child {os.getpid()} may only read")
        self._check_failed()
        if lock:
            folder.check_lock(self.path, self._lock_fd)

    def _check_batch(self, keys: KeyBatch, values: dict[str, Tensor]) -> None:
        if keys.type != self.schema.key_type:
            raise TypeError(f"store: keys: expected {self.schema.key_type}, got {keys.type}")
        if values and values.keys() != self.schema.columns.keys():
            raise ValueError(f"store: values: expected columns {', '.join(self.schema.columns)}, got {', '.join(values)}")
        for name, value in values.items():
            shape, dtype = self.schema.columns[name]
            if value.dtype != dtype:
                raise TypeError(f"store: values: {name}: expected {dtype}, got {value.dtype}")
            if tuple(value.shape) != (len(keys), *shape):
                raise ValueError(f"store: values: {name}: expected shape {(len(keys), *shape)}, got {tuple(value.shape)}")

    def _after_fork(self) -> None:
        """In the child: the parent keeps its lock and its engine; this side opens its own when it is asked for something."""
        self._lock, self._group, self._forked, self.forks = threading.RLock(), None, True, self.forks + 1
        if self.mode == "w":
            self._told = None  # of a writer's own commits nobody was told
        if self._journal is not None:
            self._journal.close(remove=False)
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def _after_fork() -> None:
    for log in list(_logs):
        log._after_fork()


os.register_at_fork(after_in_child=_after_fork)


def _at_exit() -> None:
    """What was asked for in the background is still written."""
    for log in list(_logs):
        with contextlib.suppress(Exception):
            log.wait()


atexit.register(_at_exit)
