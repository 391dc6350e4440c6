"""Small commits with one fsync: their keys and rows go into a journal, and from there into segments and engine by the hundred.

The file has a fixed size and is written from its start again once the engine has what it holds. A record counts when its checksum is right
and its commit is the one that comes next; what lies behind, from an earlier round or torn, does not.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from memkernels.store import disk
from memkernels.store.crc32c import crc32c
from memkernels.store.format import VERSION, Schema, State, check_version, damaged
from memkernels.store.runs import Run, check_rows, decode

NAME = "JOURNAL"
SIZE = 1 << 20
LARGEST = 1 << 17  # a commit of more bytes goes to the engine at once
_RECORD = struct.Struct("<4sI4Q16s")  # magic, version, bytes of all, commit, generation, bytes of the run, store


@dataclass
class Record:
    """One commit: its run, as it is in the engine later, and the bytes of its rows."""

    commit: int
    run: Run
    data: bytes
    rows: memoryview

    def state(self, before: State) -> State:
        """The state after this commit."""
        rows = before.rows + self.run.block_rows
        return State(self.commit, before.generation, rows, before.capacity, before.first_segment, before.store)


def encode(state: State, commit: int, run: Run, rows: bytes) -> bytes:
    run.first_commit = run.last_commit = commit
    data = run.encode()
    size = _RECORD.size + len(data) + len(rows) + 4
    header = _RECORD.pack(b"MKJR", VERSION, size, commit, state.generation, len(data), state.store)
    record = b"".join([header, data, rows])
    return b"".join([record, struct.pack("<I", crc32c(record))])


def read(folder: Path, schema: Schema, stride: int, state: State) -> tuple[list[Record], bool]:
    """The records behind a state, in order; and whether commits are missing before the first one, because the engine got them meanwhile."""
    try:
        fd = disk.open_file(folder / NAME, os.O_RDONLY)
    except FileNotFoundError:
        return [], False
    try:
        view = memoryview(disk.read_at(fd, min(SIZE, os.fstat(fd).st_size), 0))
    finally:
        os.close(fd)
    found: list[Record] = []
    while (size := _length(view)) and crc32c(view[: size - 4]) == struct.unpack("<I", view[size - 4 : size])[0]:
        _, version, _, commit, generation, run_size, store = _RECORD.unpack_from(view)
        check_version(NAME, version)
        if store != state.store or (found and (commit, generation) != (state.commit + 1, state.generation)):
            break
        if commit > state.commit:
            if (commit, generation) != (state.commit + 1, state.generation):
                return [], True
            found.append(_parse(view[_RECORD.size : size - 4], run_size, commit, schema, stride, state))
            state = found[-1].state(state)
        view = view[size:]
    return found, False


def _length(view: memoryview) -> int:
    """Bytes of the record that begins here, or 0."""
    if len(view) < _RECORD.size + 4 or view[:4] != b"MKJR":
        return 0
    size = _RECORD.unpack_from(view)[2]
    return size if _RECORD.size + 4 <= size <= len(view) else 0


def _parse(body: memoryview, run_size: int, commit: int, schema: Schema, stride: int, state: State) -> Record:
    data, rows = bytes(body[:run_size]), body[run_size:]
    run = decode(NAME, data, schema.key_type)
    many = run.block_rows
    if (run.first_commit, run.last_commit) != (commit, commit) or len(rows) != many * stride or (many and run.first_row != state.rows):
        raise damaged(NAME, f"commit {commit} with rows of another one")
    check_rows(NAME, run, state.rows + many)
    return Record(commit, run, data, rows)


def blocks(record: Record, stride: int) -> list[tuple[int, memoryview]]:
    """(first row, bytes) of each block."""
    out, row, at = [], record.run.first_row, 0
    for rows, crc in record.run.blocks:
        data = record.rows[at : at + rows * stride]
        if crc32c(data) != crc:
            raise damaged(NAME, f"wrong checksum of rows {row} to {row + rows}")
        out.append((row, data))
        row, at = row + rows, at + len(data)
    return out


class Journal:
    """The writer's side. `size` bytes hold commits that the engine has not."""

    def __init__(self, folder: Path) -> None:
        self.path, self.fd, self.size = folder / NAME, -1, 0

    def has_room(self, n: int) -> bool:
        return self.size + n <= SIZE

    def write(self, record: bytes) -> None:
        """An error of this can be tried again."""
        if self.fd < 0:
            self._create()
        disk.write_at(self.fd, record, self.size)

    def sync(self, record: bytes) -> None:
        """The record is durable; an error of this cannot be tried again."""
        disk.sync_data(self.fd)
        self.size += len(record)

    def _create(self) -> None:
        """Blocks that are allocated and written once: later syncs then change no metadata."""
        fd = disk.open_file(self.path, os.O_RDWR | os.O_CREAT)
        try:
            disk.write_at(fd, bytes(SIZE), 0)
            disk.sync_data(fd)
            disk.sync_directory(self.path.parent)
        except BaseException:
            os.close(fd)
            raise
        self.fd = fd

    def clear(self) -> None:
        """The engine has it all."""
        self.size = 0

    def wipe(self) -> None:
        """Nothing of what it held stays on disk."""
        self.clear()
        if self.path.exists():
            disk.overwrite(self.path)

    def close(self, remove: bool) -> None:
        """`remove` only when the engine has it all."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if remove and self.path.exists():
            disk.remove(self.path)
