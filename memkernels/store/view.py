"""What a log reads: its newest commit, in the engine and in the journal behind it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from memkernels.store import catalog, copies, folder, journal
from memkernels.store.checks import Report, verify
from memkernels.store.engine import Engine, Transaction, open_engine
from memkernels.store.errors import StoreError, StoreFormatError
from memkernels.store.format import Schema, State, damaged
from memkernels.store.journal import Record
from memkernels.store.keys import KeyBatch
from memkernels.store.segments import Chunk, Segments
from memkernels.store.tail import Tail
from memkernels.store.touch import Touched


class Moved(StoreError):
    """A rewrite has put other files in the place of those that a reader has open."""


@dataclass
class Changes:
    """Batches of keys and rows (-1: erased), later ones win; iterate it once, to its end. `restart`: they replace all that was known."""

    restart: bool = False
    batches: Iterator[tuple[KeyBatch, Tensor]] = field(default_factory=lambda: iter(()))

    def __iter__(self) -> Iterator[tuple[KeyBatch, Tensor]]:
        return self.batches


class View:
    """The reading half of a log."""

    schema: Schema
    _segments: Segments
    _state: State
    _tail: Tail
    _touched: Touched  # since the first `replay`

    def __init__(self, path: Path, mode: str) -> None:
        if mode not in ("r", "w"):
            raise ValueError(f"store: mode: expected r or w, got {mode!r}")
        self.path, self.mode = Path(path).absolute(), mode  # a relative one would follow the process to another directory
        self.closed = True
        self._lock, self._pid = threading.RLock(), os.getpid()
        self._lock_fd: int | None = None
        self._engine: Engine | None = None
        self._records: list[Record] = []  # a reader's: commits that the journal holds and the engine does not
        self._told: tuple[int, int] | None = None  # generation and commit up to which `replay` and `refresh` have given keys
        self.forks = 0  # between the process that opened this log and this one
        self._forked = False  # and nothing was read in this one yet

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
            self._check_files()
            return self._segments.chunks()

    def replay(self) -> Iterator[tuple[KeyBatch, Tensor]]:
        """Keys and rows (-1: erased) of all commits, in batches of at most a million; of equal keys the later one holds."""
        with self._lock:
            self._settle()
            transaction = self._look() if self._told is None else self._see()  # nobody has row numbers yet
            self._told = self._state.generation, self._state.commit
            return self._replay_all(transaction)

    def refresh(self) -> Changes:
        """For a reader: what was committed since the last `replay` or `refresh`, whatever else has looked at newer commits since."""
        with self._lock:
            self._check_open()
            if self._writes():
                return Changes()
            if self._moved():
                self._follow()
            transaction, told = self._look(), self._told
            self._told = self._state.generation, self._state.commit
            if told is None or told[0] != self._state.generation:
                return Changes(True, self._replay_all(transaction))
            if told == self._told:
                transaction.abort()
                return Changes()
            return Changes(False, catalog.replay(transaction, self.schema, self._state, self._records, self._touched, told[1]))

    def _replay_all(self, transaction: Transaction) -> Iterator[tuple[KeyBatch, Tensor]]:
        self._touched = Touched(self._segments.layout.stride)
        return catalog.replay(transaction, self.schema, self._state, self._records, self._touched)

    def check(self, rows: Tensor | None = None) -> None:
        """Before rows are read (None: all that `replay` and `refresh` told of): those whose checksum nobody has compared yet are compared.

        Raises:
            StoreFormatError: a wrong one. OSError: the disk could not read them.
        """
        with self._lock:
            if rows is None:
                self._touched.look_at_all(self._segments)
            else:
                self._touched.look(rows, self._segments)

    def forget_told(self) -> None:
        """What was told is not known any more: the next `refresh` gives all of it."""
        self._told = None

    def _look(self) -> Transaction:
        """`_see`, of the files that the marker names now."""
        for _ in range(100):
            try:
                return self._see()
            except Moved:
                self._follow()
        raise Moved(f"store: {self.path} is rewritten faster than it can be read")

    def _moved(self) -> bool:
        return not self._writes() and folder.read_marker(self.path) != self._marker

    def _follow(self) -> None:
        engine, segments = self._engine, self._segments
        self._load()
        segments.close()
        if engine is not None:
            engine.close()

    def _see(self) -> Transaction:
        """A transaction on the newest commit; a reader's snapshot moves to it."""
        self._check_open()
        assert self._engine is not None
        for _ in range(50):
            transaction = None
            try:
                transaction = self._engine.begin(False)
                if self._writes():
                    return transaction
                base = catalog.read_state(transaction)
                records, missed = journal.read(self.path, self.schema, self._segments.layout.stride, base)
                whole = not missed and self._newest() == base.commit  # else the writer began the journal anew meanwhile
                if whole and self._adopt(base, records):
                    return transaction
            except BaseException as error:
                if transaction is not None:
                    transaction.abort()
                if isinstance(error, (FileNotFoundError, StoreError)) and self._moved():
                    raise Moved(f"store: {self.path} was rewritten: refresh first") from None
                raise
            transaction.abort()
            if self._moved():
                raise Moved(f"store: {self.path} was rewritten: refresh first")
            if whole:
                self._recover_for_reader(base.commit)
            time.sleep(0.002)
        raise StoreError(f"store: {self.path}: no commit could be read: they come too fast, or the journal is damaged")

    def _newest(self) -> int:
        assert self._engine is not None
        transaction = self._engine.begin(False)
        try:
            return catalog.read_state(transaction).commit
        finally:
            transaction.abort()

    def _adopt(self, base: State, records: list[Record]) -> bool:
        """Whether the rows of the journal are in the segments, as they are until the machine stops; if so, this is what is seen."""
        self._segments.open(base, False)
        state, stride = base, self._segments.layout.stride
        for record in records:
            state = record.state(state)
        try:
            self._segments.open(state, False)
        except (StoreFormatError, FileNotFoundError):
            return False
        for record in records:
            if record.commit > self._state.commit:
                for row, data in journal.blocks(record, stride):
                    if self._segments.read(row, len(data) // stride) != data:
                        return False
        self._state, self._tail.rows, self._records = state, state.rows, records
        return True

    def _load(self) -> None:
        """Opens what the marker names; a writer may rename it meanwhile."""
        for attempt in range(100):
            self._marker = folder.read_marker(self.path)
            try:
                return self._load_marked()
            except (FileNotFoundError, StoreError) as error:  # sqlite says of a file that was removed just now: an error of the disk
                if attempt == 99 or folder.read_marker(self.path) == self._marker:
                    if isinstance(error, FileNotFoundError):
                        raise damaged(str(self.path), f"{error.filename} is missing") from None
                    raise

    def _load_marked(self) -> None:
        write = self.mode == "w" and self._pid == os.getpid()
        engine = open_engine(self.path, self._marker.engine, self._marker.number, write, self._syncs())
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
        self._engine, self.schema, self._state, self._segments, self._forked = engine, schema, state, segments, False
        self._tail = Tail(segments, state.rows)

    def snapshot(self, path: str | os.PathLike[str]) -> None:
        """A copy of the newest commit as a store of its own, every checksum compared on the way."""
        with self._lock:
            self._settle()
            transaction = self._see()
            try:
                copies.snapshot(self, transaction, Path(path))
            finally:
                transaction.abort()

    def verify(self) -> Report:
        """Compares every checksum."""
        with self._lock:
            self._settle()
            transaction = self._see()
            try:
                assert self._engine is not None
                return verify(self._engine, transaction, self._segments, self._state, self._records)
            except (StoreError, OSError):
                if self._moved():
                    raise Moved(f"store: {self.path} was rewritten: refresh first") from None
                raise
            finally:
                transaction.abort()

    def _writes(self) -> bool:
        return self.mode == "w" and self._pid == os.getpid()

    def _check_open(self) -> None:
        if self.closed:
            raise StoreError(f"store: {self.path} is closed")
        if self._engine is None:  # a forked child opens its own
            self._lock_reader()
            self._load()

    def _check_files(self) -> None:
        """The rows are still there. A forked child reads them through the files that it has, which keep the numbers that it knows."""
        if self.closed:
            raise StoreError(f"store: {self.path} is closed")
        if self._forked:
            self._lock_reader()
            now = folder.read_marker(self.path)
            if now != self._marker and (now.erase or now.number != self._marker.number + 1):
                raise Moved(f"store: {self.path} was rewritten and may have been erased: refresh first")
            self._forked = False

    def _lock_reader(self) -> None:
        if self._lock_fd is None:
            self._lock_fd = folder.lock_reader(self.path)

    # What the writing half does

    def _syncs(self) -> bool:
        return True

    def _settle(self) -> None:
        """The engine has every commit."""

    def _recover_for_reader(self, commit: int) -> None:
        raise NotImplementedError
