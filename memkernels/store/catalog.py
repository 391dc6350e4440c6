"""What a log keeps in its engine: the schema, the state of the last commit, and the runs."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator

from torch import Tensor

from memkernels.store.engine import Engine, Transaction
from memkernels.store.format import Schema, State, damaged
from memkernels.store.journal import NAME, Record
from memkernels.store.keys import KeyBatch
from memkernels.store.runs import PIECE, Run, batches, check_rows, decode, merge, to_merge
from memkernels.store.touch import Touched

SCHEMA, STATE, RUNS = b"schema", b"state", b"run/"
_KEY = struct.Struct(">4sQI")


def run_key(commit: int, piece: int) -> bytes:
    return _KEY.pack(RUNS, commit, piece)


def after_commit(commit: int) -> bytes:
    """Behind every run of a commit."""
    return run_key(commit, 0xFFFFFFFF)


def read_state(transaction: Transaction) -> State:
    if (data := transaction.get(STATE)) is None:
        raise damaged("the index", "no state in it")
    return State.decode(data)


def read_schema(transaction: Transaction) -> Schema:
    if (data := transaction.get(SCHEMA)) is None:
        raise damaged("the index", "no schema in it")
    return Schema.from_json(data)


def seal(engine: Engine) -> None:
    """Buries a commit that a writer was killed in: whole in the file, but not in the memory that readers keep of its newest one.

    That is LMDB's lock file, or the table of SQLite's write-ahead log. Nobody sees the commit before that memory is made anew; by then this
    writer has put other rows in the place of its rows. Any write takes its place.
    """
    transaction = engine.begin(True)
    try:
        transaction.put(STATE, read_state(transaction).encode())
    except BaseException:
        transaction.abort()
        raise
    transaction.commit()


def runs(
    transaction: Transaction, schema: Schema, state: State, journal: list[Record], after: bytes = RUNS
) -> Iterator[tuple[str, Run, bytes, bytes]]:
    """(name, run, key, bytes) of every run behind a key, those of the journal last, checked against the state."""
    for key, data in transaction.scan(RUNS, after):
        what = f"run {key.hex()}"
        run = decode(what, data, schema.key_type)
        if len(key) != _KEY.size or _KEY.unpack(key)[1] != run.last_commit or run.last_commit > state.commit:
            raise damaged(what, f"commit {run.last_commit} in a store at commit {state.commit}")
        check_rows(what, run, state.rows)
        yield what, run, key, data
    for record in journal:
        if (key := run_key(record.commit, 0)) > after:
            yield NAME, record.run, key, record.data


def replay(
    transaction: Transaction, schema: Schema, state: State, journal: list[Record], touched: Touched, after: int | None = None
) -> Iterator[tuple[KeyBatch, Tensor]]:
    """Batches of the runs of later commits (None: of all, whose rows must then be all there are); ends the transaction.

    `touched` gets the blocks of the rows.
    """
    row = 0
    try:
        for what, run, _, _ in runs(transaction, schema, state, journal, RUNS if after is None else after_commit(after)):
            row = follows(what, run, row) if after is None else row
            touched.add(run.first_row, run.blocks)
            yield from batches(what, run)
        if after is None and row != state.rows:
            raise damaged("the index", f"checksums of {row} rows of {state.rows}")
    finally:
        transaction.abort()


def follows(what: str, run: Run, row: int) -> int:
    """The row behind those of a run, which must begin where the one before ended."""
    if run.blocks and run.first_row != row:
        raise damaged(what, f"rows from {run.first_row} on where {row} comes next")
    return row + run.block_rows


def _joined(commits: list[list[Run]], state: State, stride: int) -> list[Run]:
    """The runs of the next commits, numbered; neighbours become one as long as it stays small."""
    groups: list[list[Run]] = []
    size = 0
    for i, commit in enumerate(commits):
        for run in commit:
            run.first_commit = run.last_commit = state.commit + 1 + i
            if not groups or size + run.key_bytes > PIECE:
                groups.append([])
                size = 0
            groups[-1].append(run)
            size += run.key_bytes
    return [group[0] if len(group) == 1 else merge(group, stride, state.capacity) for group in groups]


class Catalog:
    """The writer's side: puts commits into the engine and joins small runs as it goes."""

    def __init__(self, engine: Engine, schema: Schema, stride: int, state: State) -> None:
        self.engine, self.schema, self.stride, self.state = engine, schema, stride, state
        self._runs: list[tuple[bytes, int]] = []  # key and bytes of each, in order

    def load(self) -> None:
        transaction = self.engine.begin(False)
        try:
            self._runs = [(key, len(data)) for key, data in transaction.scan(RUNS, RUNS)]
        finally:
            transaction.abort()

    def prepare(self, new: list[list[Run]], rows: int) -> Commit:
        """Everything of these commits but the commit itself, in a transaction."""
        transaction = self.engine.begin(True)
        try:
            known, commit = list(self._runs), self.state.commit + len(new)
            for run in _joined(new, self.state, self.stride):
                piece = _KEY.unpack(known[-1][0])[2] + 1 if known and known[-1][0] >= run_key(run.last_commit, 0) else 0
                self._put(transaction, known, run_key(run.last_commit, piece), run)
            if (n := to_merge([size for _, size in known])) > 1:
                self._merge(transaction, known, n)
            state = dataclasses.replace(self.state, commit=commit, rows=rows)
            transaction.put(STATE, state.encode())
        except BaseException:
            transaction.abort()
            raise
        return Commit(self, transaction, state, known)

    def _put(self, transaction: Transaction, known: list[tuple[bytes, int]], key: bytes, run: Run) -> None:
        data = run.encode()
        transaction.put(key, data)
        known.append((key, len(data)))

    def _merge(self, transaction: Transaction, known: list[tuple[bytes, int]], n: int) -> None:
        keys = [key for key, _ in known[-n:]]
        found = [decode(f"run {key.hex()}", transaction.get(key) or b"", self.schema.key_type) for key in keys]
        for key in keys[:-1]:
            transaction.delete(key)
        del known[-n:]
        self._put(transaction, known, keys[-1], merge(found, self.stride, self.state.capacity))


@dataclasses.dataclass
class Commit:
    """A transaction of the writer's that lacks only its commit."""

    catalog: Catalog
    transaction: Transaction
    state: State
    runs: list[tuple[bytes, int]]

    def finish(self) -> None:
        """Raises when it may or may not have become durable."""
        self.transaction.commit()
        self.catalog.state, self.catalog._runs = self.state, self.runs
