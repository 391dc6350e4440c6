"""Append-only files of rows of one width: written with pwrite, whose errors are exceptions, read through memory maps."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memkernels.store import disk
from memkernels.store.crc32c import crc32c
from memkernels.store.format import BLOCK, HEADER, Layout, Schema, SegmentHeader, State, damaged
from memkernels.store.runs import tensor_of

PIECE = 1 << 18  # bytes of a file that are read at a time for a checksum
STEP = 1 << 20  # a file grows by this, or by an eighth


@dataclass(frozen=True)
class Chunk:
    """Rows that lie in one piece of memory: `columns` are views of shape "rows ..." of the mapped file, not to be written.

    The last rows of the last chunk may not have been given out yet.
    """

    first_row: int
    rows: int
    columns: dict[str, Tensor]


def file_name(number: int) -> str:
    return f"segment-{number:08d}.mkv"


class Segment:
    """One file. `size` is its length, of which rows fill the front."""

    def __init__(self, fd: int, path: Path, size: int) -> None:
        self.fd, self.path, self.size, self.dirty = fd, path, size, False
        self.chunk: Chunk | None = None

    def close(self) -> None:
        fd, self.fd, self.chunk = self.fd, -1, None  # first: one that is interrupted does not close the number again
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


class Segments:
    """The segments of one generation of a store."""

    def __init__(self, folder: Path, schema: Schema, state: State) -> None:
        self.folder, self.schema, self.state = folder, schema, state
        self.layout = Layout.of(schema)
        self.files: list[Segment] = []
        self.unnamed = False  # a file was created whose name is not durable yet
        self._buffer = bytearray(0)
        self._staged: dict[str, Tensor] = {}

    def path(self, index: int) -> Path:
        return self.folder / file_name(self.state.first_segment + index)

    def header(self, index: int) -> SegmentHeader:
        state = self.state
        first = state.first_segment + index, state.generation, index * state.capacity
        return SegmentHeader(state.store, *first, self.layout.stride)

    def open(self, state: State, write: bool) -> None:
        """Opens what a state needs and is not open yet; every file must be long enough and of this store."""
        self.state, stride = state, self.layout.stride
        for index in range(state.segments):
            needed = HEADER + min(state.capacity, state.rows - index * state.capacity) * stride
            if index == len(self.files):
                self.files.append(self._open_file(index, write))
            segment = self.files[index]
            if segment.size < needed:
                segment.size, segment.chunk = os.fstat(segment.fd).st_size, None
            if segment.size < needed:
                raise damaged(segment.path.name, f"{segment.size} bytes where {needed} are needed")

    def _open_file(self, index: int, write: bool) -> Segment:
        path = self.path(index)
        fd = disk.open_file(path, os.O_RDWR if write else os.O_RDONLY)
        segment = Segment(fd, path, os.fstat(fd).st_size)
        if SegmentHeader.decode(path.name, disk.read_at(fd, HEADER, 0)) != self.header(index):
            raise damaged(path.name, "it belongs to another store or place")
        return segment

    def _create(self, index: int) -> Segment:
        path = self.path(index)
        segment = Segment(disk.open_file(path, os.O_RDWR | os.O_CREAT), path, 0)  # never cut: a reader may have it mapped
        disk.write_at(segment.fd, self.header(index).encode(), 0)
        segment.size, segment.dirty, self.unnamed = os.fstat(segment.fd).st_size, True, True
        return segment

    def write(self, row: int, values: dict[str, Tensor], blocks: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Writes rows from `row` on; gives `blocks` with theirs added. When it raises, nothing that was committed has changed."""
        n, done, stride = len(next(iter(values.values()))), 0, self.layout.stride
        blocks = list(blocks)
        while done < n:
            at = (row + done) % self.state.capacity
            many = min(n - done, max(1, BLOCK // stride), self.state.capacity - at)
            data = self._stage({name: value[done : done + many] for name, value in values.items()}, many)
            self.write_block(row + done, data)
            before = blocks[-1][0] if blocks and at else 0
            if before and (before + many) * stride <= BLOCK:
                blocks[-1] = before + many, crc32c(data, blocks[-1][1])
            else:
                blocks.append((many, crc32c(data)))
            done += many
        return blocks

    def write_block(self, row: int, data: Any) -> None:
        """The bytes of rows that lie in one segment."""
        index, at = divmod(row, self.state.capacity)
        if index == len(self.files):
            self.files.append(self._create(index))
        segment, offset = self.files[index], HEADER + at * self.layout.stride
        self._grow(segment, offset + len(data))
        disk.write_at(segment.fd, data, offset)
        segment.dirty = True  # behind the write: a sync in another thread clears it before it begins

    def wipe(self) -> None:
        """No bytes of rows stay in memory of its own."""
        self._buffer[:] = bytes(len(self._buffer))

    def _stage(self, values: dict[str, Tensor], rows: int) -> memoryview:
        """The records of up to a block's rows, in the buffer."""
        stride = self.layout.stride
        if len(self._buffer) < rows * stride:
            full = max(1, BLOCK // stride)
            most = full if rows > full // 8 else rows  # single rows do not take a megabyte
            buffer = bytearray(most * stride)
            self._staged = self._views(buffer, 0, most)
            self._buffer = buffer  # last: what is written is the buffer that the views are of, or a next call makes both anew
        for name, value in values.items():
            self._staged[name][:rows].copy_(value)
        return memoryview(self._buffer)[: rows * stride]

    def _views(self, buffer: bytearray | mmap.mmap, offset: int, rows: int) -> dict[str, Tensor]:
        flat, stride, views = tensor_of(buffer, torch.uint8, rows * self.layout.stride, offset), self.layout.stride, {}
        for name, (shape, dtype) in self.schema.columns.items():
            inner: list[int] = []
            step = 1
            for n in reversed(shape):
                inner.insert(0, step)
                step *= n
            size = dtype.itemsize
            start = self.layout.offsets[name] // size
            views[name] = flat.view(dtype).as_strided((rows, *shape), (stride // size, *inner), start if step else 0)
        return views

    def _grow(self, segment: Segment, needed: int) -> None:
        if needed > segment.size:
            full = HEADER + self.state.capacity * self.layout.stride
            size = min(full, max(needed, segment.size + max(STEP, segment.size // 8)))
            disk.resize(segment.fd, size)
            segment.size = size

    def sync(self) -> None:
        """All rows written are durable when this returns."""
        for segment in self.files:
            if segment.dirty:
                segment.dirty = False
                disk.sync_data(segment.fd)
        if self.unnamed:
            self.unnamed = False
            disk.sync_directory(self.folder)

    def chunks(self) -> list[Chunk]:
        out = []
        for index, segment in enumerate(self.files):
            if segment.chunk is None or segment.chunk.rows != self._rows_in(segment):
                segment.chunk = self._map(index, segment)
            if segment.chunk.rows:
                out.append(segment.chunk)
        return out

    def _rows_in(self, segment: Segment) -> int:
        return min((segment.size - HEADER) // self.layout.stride, self.state.capacity)

    def _map(self, index: int, segment: Segment) -> Chunk:
        for _ in range(100):
            segment.size = os.fstat(segment.fd).st_size  # to a reader: a writer may have cut it behind its last row
            rows = self._rows_in(segment)
            try:
                size = HEADER + rows * self.layout.stride
                mapped = mmap.mmap(segment.fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
            except ValueError:  # cut just now
                continue
            return Chunk(index * self.state.capacity, rows, self._views(mapped, HEADER, rows))
        raise damaged(segment.path.name, "it is being cut")

    def read(self, row: int, rows: int) -> bytes:
        """The bytes of rows that lie in one segment, from the file itself."""
        index, at = divmod(row, self.state.capacity)
        return disk.read_at(self.files[index].fd, rows * self.layout.stride, HEADER + at * self.layout.stride)

    def checksum(self, row: int, rows: int) -> int | None:
        """CRC32C of rows that lie in one segment, from the file itself; None where it ends before them."""
        index, at = divmod(row, self.state.capacity)
        left, offset, crc = rows * self.layout.stride, HEADER + at * self.layout.stride, 0
        piece = memoryview(bytearray(min(left, PIECE)))  # stays in cache, where a megabyte would be fresh memory each time
        while left:
            size = disk.read_into(self.files[index].fd, piece[: min(left, PIECE)], offset)
            if not size:
                return None
            crc, left, offset = crc32c(piece[:size], crc), left - size, offset + size
        return crc

    def trim(self, rows: int) -> None:
        """Gives back what files are longer than `rows` rows need."""
        for index, segment in enumerate(self.files):
            used = HEADER + max(0, min(self.state.capacity, rows - index * self.state.capacity)) * self.layout.stride
            if segment.size > used:
                disk.resize(segment.fd, used)
                segment.size, segment.chunk = used, None

    def close(self) -> None:
        for segment in self.files:
            segment.close()
        self.files = []
