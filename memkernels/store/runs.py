"""Runs: what commits put into the engine. A run holds keys, the rows they got (or that they were erased), and the checksums of those rows.

    header (72 bytes) | spans: count, first row or -1 | blocks: rows, CRC32C | bytes of each key (not for int64) | keys | CRC32C

Rows are given out in order, so that a few spans say which key got which; keys come in the order of the calls and later ones win. Small
runs are joined as in a log-structured tree: eight of one size become one of the next, so that opening a store reads few of them.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from memkernels.store.crc32c import combine, crc32c
from memkernels.store.errors import StoreError
from memkernels.store.format import BLOCK, KEY_TYPES, VERSION, check_version, damaged
from memkernels.store.keys import KeyBatch

ERASED = -1
PIECE = 1 << 22  # bytes of keys in a run, about, at most: more keys of one commit go into several
BATCH = 1 << 20  # keys that replay gives at a time, at most
FANOUT = 8
_LEVELS = (1 << 11, 1 << 14, 1 << 17, 1 << 20)  # a run of fewer bytes is of that level
_HEADER = struct.Struct("<4sHBB8Q")
_NO_WARNING: list[bool] = []


def tensor_of(buffer: Any, dtype: torch.dtype, count: int | None = None, offset: int = 0) -> Tensor:
    """A view of a buffer; one that is read-only must not be written through the tensor."""
    if not _NO_WARNING:  # torch warns of read-only buffers, once a process
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.frombuffer(b"\0", dtype=torch.uint8)
        _NO_WARNING.append(True)
    count = (len(buffer) - offset) // dtype.itemsize if count is None else count
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset) if count else torch.empty(0, dtype=dtype)


def bytes_of(tensor: Tensor, dtype: torch.dtype) -> bytearray:
    """A copy of the elements, little-endian."""
    if sys.byteorder != "little":
        raise StoreError("store: files are little-endian and this machine is not")
    out = bytearray(tensor.numel() * dtype.itemsize)
    if out:
        torch.frombuffer(out, dtype=dtype).copy_(tensor.reshape(-1))
    return out


@dataclass
class Run:
    """A run being built or read. Blocks cover `sum(rows)` rows from `first_row` on."""

    key_type: str
    first_row: int = 0
    count: int = 0
    keys: list[Any] = field(default_factory=list)  # buffers of int64 keys, or of the keys' bytes
    lengths: list[Any] = field(default_factory=list)  # buffers of uint32
    spans: list[tuple[int, int]] = field(default_factory=list)
    blocks: list[tuple[int, int]] = field(default_factory=list)
    first_commit: int = 0
    last_commit: int = 0
    key_bytes: int = 0

    def add(self, keys: KeyBatch, first_row: int) -> None:
        """`first_row` of the rows that these keys got in order, or ERASED."""
        n = len(keys)
        if not n:
            return
        if self.key_type == "int64":
            assert keys.ints is not None
            self.keys.append(bytes_of(keys.ints, torch.int64))
        else:
            assert keys.data is not None and keys.offsets is not None
            low, high = int(keys.offsets[0]), int(keys.offsets[-1])
            self.keys.append(bytes_of(keys.data[low:high], torch.uint8))
            self.lengths.append(bytes_of(keys.offsets.diff().to(torch.int32), torch.int32))
        self.count += n
        self.key_bytes += len(self.keys[-1])
        self.add_span(n, first_row)

    def add_span(self, count: int, first: int) -> None:
        if self.spans:
            before, start = self.spans[-1]
            if (first == ERASED and start == ERASED) or (start != ERASED and first == start + before):
                self.spans[-1] = before + count, start
                return
        self.spans.append((count, first))

    def mark(self) -> tuple[Any, ...]:
        """How far it is filled, for `back_to`: the last span and block may grow, the rest is only added to."""
        lists = self.keys, self.lengths, self.spans, self.blocks
        return self.first_row, self.count, self.key_bytes, [len(one) for one in lists], self.spans[-1:], self.blocks[-1:]

    def back_to(self, mark: tuple[Any, ...]) -> None:
        """As it was when `mark` was asked for."""
        self.first_row, self.count, self.key_bytes, sizes, span, block = mark
        for one, size in zip((self.keys, self.lengths, self.spans, self.blocks), sizes, strict=True):
            del one[size:]  # type: ignore[attr-defined]
        self.spans[-1:], self.blocks[-1:] = span, block

    @property
    def block_rows(self) -> int:
        return sum(rows for rows, _ in self.blocks)

    def encode(self) -> bytes:
        sizes = self.count, self.key_bytes, len(self.spans), len(self.blocks), self.first_row
        kind = KEY_TYPES.index(self.key_type)
        header = _HEADER.pack(b"MKRN", VERSION, kind, 0, self.first_commit, self.last_commit, *sizes, 0)
        spans = b"".join(struct.pack("<Qq", *span) for span in self.spans)
        blocks = b"".join(struct.pack("<II", *block) for block in self.blocks)
        data = b"".join([header, spans, blocks, *self.lengths, *self.keys])
        return b"".join([data, struct.pack("<I", crc32c(data))])


def level(size: int) -> int:
    return next((i for i, limit in enumerate(_LEVELS) if size < limit), len(_LEVELS))


def to_merge(sizes: list[int]) -> int:
    """How many of the last runs to join: the most that are of one level or below, once there are FANOUT of them."""
    best = 0
    for i in range(len(_LEVELS)):
        run = 0
        while run < len(sizes) and level(sizes[-1 - run]) <= i:
            run += 1
        if run >= FANOUT:
            best = run
    return best


def merge(runs: list[Run], stride: int, capacity: int) -> Run:
    """One run that says what these say one after another. Small blocks are joined, up to 1 MiB and never over the end of a segment."""
    out = Run(runs[0].key_type, first_commit=runs[0].first_commit, last_commit=runs[-1].last_commit)
    row = next((run.first_row for run in runs if run.blocks), 0)
    out.first_row = row
    for run in runs:
        out.count += run.count
        out.key_bytes += run.key_bytes
        out.keys += run.keys
        out.lengths += run.lengths
        for span in run.spans:
            out.add_span(*span)
        for rows, crc in run.blocks:
            last = out.blocks[-1][0] if out.blocks else 0
            if last and (last + rows) * stride <= BLOCK and row % capacity:
                out.blocks[-1] = last + rows, combine(out.blocks[-1][1], crc, rows * stride)
            else:
                out.blocks.append((rows, crc))
            row += rows
    return out


def decode(what: str, data: bytes, key_type: str) -> Run:
    """Checks lengths, sums and checksum; `check_rows` compares with the state."""
    if len(data) < _HEADER.size + 4 or data[:4] != b"MKRN":
        raise damaged(what, "no header of a run")
    check_version(what, struct.unpack_from("<H", data, 4)[0])
    _, _, kind, zero, first_commit, last_commit, count, size, spans, blocks, first_row, unused = _HEADER.unpack_from(data)
    at_blocks = _HEADER.size + 16 * spans
    at_lengths = at_blocks + 8 * blocks
    at_keys = at_lengths + (0 if kind == 0 else 4 * count)
    if at_keys + size + 4 != len(data) or (kind == 0 and size != 8 * count):
        raise damaged(what, f"sizes that do not add up to {len(data)} bytes")
    if kind >= len(KEY_TYPES) or KEY_TYPES[kind] != key_type or zero or unused:
        raise damaged(what, f"keys of kind {kind} in a store of {key_type} keys")
    view = memoryview(data)
    if crc32c(view[:-4]) != struct.unpack("<I", view[-4:])[0]:
        raise damaged(what, "wrong checksum")
    run = Run(key_type, first_row, count, [view[at_keys:-4]], [view[at_lengths:at_keys]])
    run.first_commit, run.last_commit, run.key_bytes = first_commit, last_commit, size
    run.spans = list(struct.iter_unpack("<Qq", view[_HEADER.size : at_blocks]))  # type: ignore[arg-type]
    run.blocks = list(struct.iter_unpack("<II", view[at_blocks:at_lengths]))  # type: ignore[arg-type]
    if sum(n for n, _ in run.spans) != count or first_commit > last_commit:
        raise damaged(what, "rows for other keys than it has")
    return run


def check_rows(what: str, run: Run, rows: int) -> None:
    """No key has a row that the store has not."""
    for count, first in run.spans:
        if first != ERASED and (first < 0 or first + count > rows):
            raise damaged(what, f"rows {first} to {first + count} of {rows}")
    if run.first_row + run.block_rows > rows:
        raise damaged(what, f"checksums of rows up to {run.first_row + run.block_rows} of {rows}")


def batches(what: str, run: Run) -> Iterator[tuple[KeyBatch, Tensor]]:
    """Keys and rows of a decoded run."""
    spans = torch.tensor(run.spans, dtype=torch.int64).reshape(-1, 2)
    ends = spans[:, 0].cumsum(0)
    offsets = None
    if run.key_type != "int64":
        lengths = tensor_of(run.lengths[0], torch.int32) if run.count else torch.empty(0, dtype=torch.int32)
        offsets = torch.zeros(run.count + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, dtype=torch.int64, out=offsets[1:])
        if int(offsets[-1]) != len(run.keys[0]) or (run.count and int(lengths.min()) < 0):
            raise damaged(what, "lengths of keys that do not add up")
    for low in range(0, run.count, BATCH):
        high = min(low + BATCH, run.count)
        yield _keys(what, run, offsets, low, high), _rows(spans, ends, low, high)


def _keys(what: str, run: Run, offsets: Tensor | None, low: int, high: int) -> KeyBatch:
    if offsets is None:
        return KeyBatch("int64", ints=tensor_of(run.keys[0], torch.int64, high - low, 8 * low))
    own = offsets[low : high + 1]
    start, stop = int(own[0]), int(own[-1])
    data = tensor_of(run.keys[0], torch.uint8, stop - start, start)
    if run.key_type == "str":
        check_utf8(what, data, own - start, run.keys[0][start:stop])
    return KeyBatch(run.key_type, data=data, offsets=own - start)


def check_utf8(what: str, data: Tensor, offsets: Tensor, view: Any) -> None:
    try:
        str(view, "utf-8")
    except UnicodeDecodeError as error:
        raise damaged(what, f"a key that is not UTF-8 ({error.reason})") from error
    starts = offsets[:-1][offsets[:-1] < offsets[1:]]
    if bool(((data[starts] & 0xC0) == 0x80).any()):
        raise damaged(what, "a key that begins inside a character")


def _rows(spans: Tensor, ends: Tensor, low: int, high: int) -> Tensor:
    """Rows of keys low to high."""
    if len(spans) == 1 and int(spans[0, 1]) != ERASED:
        return torch.arange(low, high).add_(spans[0, 1])
    at = torch.arange(low, high)
    span = torch.searchsorted(ends, at, right=True)
    first, begin = spans[span, 1], ends[span] - spans[span, 0]
    return torch.where(first == ERASED, first, first + at - begin)


def pieces(keys: KeyBatch) -> Iterator[tuple[int, int, KeyBatch]]:
    """(low, high, keys low to high) of at most about PIECE bytes each."""
    n, low = len(keys), 0
    while low < n:
        if keys.ints is not None:
            high = min(n, low + PIECE // 8)
            yield low, high, KeyBatch("int64", ints=keys.ints[low:high])
        else:
            assert keys.offsets is not None
            high = min(n, low + PIECE // 16)
            limit = int(torch.searchsorted(keys.offsets, keys.offsets[low] + PIECE, right=True)) - 1
            high = max(low + 1, min(high, limit))
            yield low, high, KeyBatch(keys.type, data=keys.data, offsets=keys.offsets[low : high + 1])
        low = high
