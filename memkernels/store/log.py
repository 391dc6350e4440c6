"""The log of a store on disk: rows in append-only segments, keys and commits in a small transactional engine.

A commit writes segments, syncs them, then commits one engine transaction with the keys, the checksums of the rows and the new state. What
the engine does not name does not exist, so that nothing has to be repaired after a crash.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memkernels.store import catalog, copies, disk, folder
from memkernels.store.checks import Report, verify
from memkernels.store.engine import Engine, default_engine, engine_files, open_engine
from memkernels.store.errors import StoreError, StoreFormatError
from memkernels.store.format import HEADER, Layout, Marker, Schema, State, damaged
from memkernels.store.group import Group
from memkernels.store.keys import KeyBatch
from memkernels.store.runs import Run
from memkernels.store.segments import Chunk, Segments
from memkernels.store.tail import Tail

DURABILITY = ("none", "async", "commit")
SEGMENT = 1 << 30  # bytes of a segment, about
_logs: weakref.WeakSet[Log] = weakref.WeakSet()


@dataclass
class Changes:
    """Batches of keys and rows (-1: erased), later ones win; iterate it once, to its end. `restart`: they replace all that was known."""

    restart: bool = False
    batches: Iterator[tuple[KeyBatch, Tensor]] = field(default_factory=lambda: iter(()))

    def __iter__(self) -> Iterator[tuple[KeyBatch, Tensor]]:
        return self.batches


class Log:
    """One writer, or one of many readers with a snapshot that `refresh` moves on. Thread-safe. See `create` and `open`."""

    def __init__(self, path: Path, mode: str, durability: str) -> None:
        if durability not in DURABILITY:
            raise ValueError(f"store: durability: expected {', '.join(DURABILITY)}, got {durability!r}")
        if mode not in ("r", "w"):
            raise ValueError(f"store: mode: expected r or w, got {mode!r}")
        self.path, self.mode, self.durability = Path(path), mode, durability
        self.closed = True
        self._lock, self._pid = threading.RLock(), os.getpid()
        self._lock_fd: int | None = None
        self._engine: Engine | None = None
        self._group: Group | None = None
        self._failed: BaseException | None = None
        self._given = 0  # number of the last commit that was asked for

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
        self.path.mkdir(parents=True, exist_ok=True)
        disk.refuse_network(self.path)
        self._lock_fd = folder.lock_writer(self.path)
        try:
            folder.prepare_new(self.path)
            capacity = max(1, (segment_bytes - HEADER) // Layout.of(schema).stride)
            state = State(0, 0, 0, capacity, 1, os.urandom(16))
            copies.new_engine(self.path, Marker(name, 1), schema, self._durable, lambda _: state)
            folder.write_marker(self.path, Marker(name, 1), self._durable)
            if self._durable:
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

    @property
    def _durable(self) -> bool:
        return self.durability != "none"

    def _start(self) -> None:
        self.closed = False
        self._load()
        if self.mode == "w":
            folder.remove_unused(self.path, self._marker, self._state)
            self._given = self._state.commit
            if self.durability == "async":
                self._group = Group(self._write)
        _logs.add(self)

    def _load(self) -> None:
        """Opens what the marker names; a writer may rename it meanwhile."""
        for attempt in range(100):
            self._marker = folder.read_marker(self.path)
            try:
                return self._load_marked()
            except (FileNotFoundError, StoreFormatError) as error:
                if attempt == 99 or folder.read_marker(self.path) == self._marker:
                    if isinstance(error, FileNotFoundError):
                        raise damaged(str(self.path), f"{error.filename} is missing") from None
                    raise

    def _load_marked(self) -> None:
        write = self.mode == "w" and self._pid == os.getpid()
        engine = open_engine(self.path, self._marker.engine, self._marker.number, write, self._durable)
        try:
            transaction = engine.begin(False)
            try:
                state, schema = catalog.read_state(transaction), catalog.read_schema(transaction)
            finally:
                transaction.abort()
            try:
                segments = Segments(self.path, schema, state)
            except ValueError as error:
                raise damaged("the schema", str(error)) from error
            segments.open(state, write)
            self._catalog = catalog.Catalog(engine, schema, segments.layout.stride, state)
            if write:
                self._catalog.load()
        except BaseException:
            engine.close()
            raise
        self._engine, self.schema, self._state, self._segments = engine, schema, state, segments
        self._tail = Tail(segments, state.rows)

    # What is known

    @property
    def commit_number(self) -> int:
        """Of the last commit that this log has seen in the engine."""
        return self._state.commit

    @property
    def generation(self) -> int:
        """How often the store was rewritten; rows are numbered anew in each generation."""
        return self._state.generation

    @property
    def rows(self) -> int:
        """Rows given out, of which those behind the last commit can still be rolled back."""
        return self._tail.rows

    @property
    def engine(self) -> str:
        return self._marker.engine

    def nbytes(self) -> int:
        """Bytes on disk, as the file system counts them."""
        return sum(f.stat().st_blocks * 512 for f in self.path.iterdir() if f.is_file())

    def chunks(self) -> list[Chunk]:
        """Every row in memory that is mapped, in order. Ask again after `append`, `refresh` and `rewrite`."""
        with self._lock:
            self._check_open()
            return self._segments.chunks()

    def replay(self) -> Iterator[tuple[KeyBatch, Tensor]]:
        """Keys and rows (-1: erased) of all commits, in batches of at most a million; of equal keys the later one holds."""
        with self._lock:
            self.wait()
            transaction = self._see()
            return catalog.replay(transaction, self.schema, self._state, None)

    def refresh(self) -> Changes:
        """For a reader: what was committed since it last looked."""
        with self._lock:
            self._check_open()
            if self._writes():
                return Changes()
            if folder.read_marker(self.path) != self._marker:
                engine, segments = self._engine, self._segments
                self._load()
                segments.close()
                if engine is not None:
                    engine.close()
                return Changes(True, self.replay())
            before = self._state.commit
            transaction = self._see()
            if self._state.commit == before:
                transaction.abort()
                return Changes()
            return Changes(False, catalog.replay(transaction, self.schema, self._state, before))

    def _see(self) -> Any:
        """A transaction on the newest commit; a reader's snapshot moves to it."""
        self._check_open()
        assert self._engine is not None
        transaction = self._engine.begin(False)
        try:
            state = catalog.read_state(transaction)
            if not self._writes():
                if (state.generation, state.store) != (self._state.generation, self._state.store):
                    raise damaged("the state", "it is of another store")
                self._segments.open(state, False)
                self._state, self._tail.rows = state, state.rows
        except BaseException:
            transaction.abort()
            raise
        return transaction

    # Writing

    def append(self, keys: KeyBatch, values: dict[str, Tensor]) -> Tensor:
        """Row numbers int64 "n". Readable at once, durable and seen by others after `commit`. When it raises, as if not called."""
        with self._lock:
            self._check_write()
            self._check_batch(keys, values)
            first = self._tail.append(keys, values)
            return torch.arange(first, first + len(keys))

    def forget(self, keys: KeyBatch) -> None:
        """These keys are erased as of the next commit."""
        with self._lock:
            self._check_write()
            self._check_batch(keys, {})
            self._tail.forget(keys)

    def commit(self) -> int:
        """Its number. On return all before it is durable ("commit"), or will be soon ("async"), or is safe from this process only ("none").

        After an error of the disk the log refuses further writes: what the last fsync left on disk is known only to one who opens it anew.
        """
        with self._lock:
            self._check_write()
            if not self._tail.runs:
                return self._given
            item = self._tail.runs, self._tail.rows
            if self._group is not None:
                self._tail.take()
                self._given += 1
                self._group.submit(item)
            else:
                self._write([item])
                self._tail.take()
                self._given = self._state.commit
            return self._given

    def wait(self) -> None:
        """Until all commits are durable; for durability "async"."""
        if self._group is not None and self._pid == os.getpid():
            self._group.wait()
            self._check_failed()

    def rollback(self) -> None:
        """Drops what was appended or forgotten since the last commit; its row numbers are given out again."""
        with self._lock:
            self._check_write()
            dropped = self._tail.take()
            self._tail.rows -= sum(run.block_rows for run in dropped)

    def _write(self, items: list[tuple[list[Run], int]]) -> None:
        """Commits each of these, in one transaction. An error before its end can be tried again, one of a sync or of the end cannot."""
        try:
            if self._durable:
                self._segments.sync()
        except BaseException as error:
            self._fail(error)
            raise
        try:
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
        self._state = self._catalog.state

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
            self._check_write()
            self.wait()
            if self._tail.runs:
                raise StoreError("store: rewrite: commit or roll back first")
            copies.rewrite(self, batches, erase)

    def snapshot(self, path: str | os.PathLike[str]) -> None:
        """A copy of the newest commit as a store of its own, every checksum compared on the way."""
        with self._lock:
            self.wait()
            transaction = self._see()
            try:
                copies.snapshot(self, transaction, Path(path))
            finally:
                transaction.abort()

    def verify(self) -> Report:
        """Compares every checksum."""
        with self._lock:
            self.wait()
            transaction = self._see()
            try:
                assert self._engine is not None
                return verify(self._engine, transaction, self._segments, self._state, self.schema)
            finally:
                transaction.abort()

    def close(self) -> None:
        """Drops what was not committed, waits for commits in the background, lets the next writer in."""
        with self._lock:
            if self.closed:
                return
            try:
                if self._group is not None and self._pid == os.getpid():
                    self._group.stop()
                    if self._failed is not None:
                        self._check_failed()
                elif self._writes() and self._failed is None:
                    copies.trim(self._segments, self._state.rows)
            finally:
                self._release()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "closed", True) and self._pid == os.getpid():
            self._release()

    def _release(self) -> None:
        self.closed = True
        if self._engine is not None:
            self._engine.close()
            self._engine = None
            self._segments.close()
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    # Checks

    def _writes(self) -> bool:
        return self.mode == "w" and self._pid == os.getpid()

    def _check_open(self) -> None:
        if self.closed:
            raise StoreError(f"store: {self.path} is closed")
        if self._engine is None:  # a forked child opens its own
            self._lock_fd = folder.lock_reader(self.path)
            self._load()

    def _check_failed(self) -> None:
        if self._failed is not None:
            raise StoreError(
                f"store: {self.path}: writing failed ({type(self._failed).__name__}: {self._failed}); nothing after commit"
                f" {self._state.commit} is known to be on disk: close the store and open it again"
            ) from self._failed

    def _check_write(self) -> None:
        if self.closed:
            raise StoreError(f"store: {self.path} is closed")
        if self.mode != "w":
            raise StoreError(f"store: {self.path} is open for reading only")
        if self._pid != os.getpid():
            raise StoreError(f"store: {self.path} was opened to write by process {self._pid}; its child {os.getpid()} may only read")
        self._check_failed()

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
        self._lock, self._group = threading.RLock(), None
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
