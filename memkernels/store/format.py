"""What lies on disk beside the rows: the marker, the schema, the state and the headers of segments.

Nothing here trusts what it reads: every length is compared with the bytes at hand before it is used, and every record ends in a CRC32C.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import Any

import torch

from memkernels.store.crc32c import crc32c
from memkernels.store.errors import StoreFormatError

VERSION = 1
BLOCK = 1 << 20  # bytes of rows under one checksum, at most
HEADER = 4096  # bytes of a segment before its first row
MARKER = 256  # bytes of the marker, at most
RECORD = 1 << 40  # bytes of one row, at most
KEY_TYPES = ("int64", "bytes", "str")
_NAMES = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz complex128 complex64 "
    "int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool"
).split()
DTYPES = {name: getattr(torch, name) for name in _NAMES if hasattr(torch, name)}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_STATE = struct.Struct("<4sIQQQQQ16s")
_SEGMENT = struct.Struct("<8sII16sQQQQ")


def damaged(what: str, why: str) -> StoreFormatError:
    return StoreFormatError(f"store: {what} is damaged or not part of a store: {why}")


def check_version(what: str, version: int) -> None:
    if version > VERSION:
        raise StoreFormatError(f"store: {what} has format version {version}; this memkernels reads up to {VERSION}: use a newer one")
    if version < 1:
        raise damaged(what, f"format version {version}")


def seal(data: bytes) -> bytes:
    return data + struct.pack("<I", crc32c(data))


def unseal(what: str, data: Any) -> memoryview:
    """The record without its checksum, which must be right."""
    view = memoryview(data)
    if len(view) < 4 or crc32c(view[:-4]) != struct.unpack("<I", view[-4:])[0]:
        raise damaged(what, "wrong checksum")
    return view[:-4]


@dataclass(frozen=True)
class Schema:
    """What a store holds: the type of its keys, its columns (name: shape and dtype of a row), and settings of the caller's as JSON."""

    key_type: str
    columns: dict[str, tuple[tuple[int, ...], torch.dtype]]
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.key_type not in KEY_TYPES:
            raise ValueError(f"store: key_type: expected {', '.join(KEY_TYPES)}, got {self.key_type!r}")
        if not 1 <= len(self.columns) <= 1024:
            raise ValueError(f"store: columns: expected 1 to 1024, got {len(self.columns)}")
        for name, (shape, dtype) in self.columns.items():
            if not isinstance(name, str) or not name or len(name) > 256:
                raise ValueError(f"store: columns: expected names of 1 to 256 characters, got {name!r}")
            if dtype not in _DTYPE_NAMES:
                raise TypeError(f"store: columns: {name}: expected one of {', '.join(DTYPES)}, got {dtype}")
            if len(shape) > 64 or any(not isinstance(n, int) or isinstance(n, bool) or not 0 <= n <= RECORD for n in shape):
                raise ValueError(f"store: columns: {name}: expected at most 64 sizes of at least 0, got {tuple(shape)}")

    def to_json(self) -> bytes:
        columns = [[name, list(shape), _DTYPE_NAMES[dtype]] for name, (shape, dtype) in self.columns.items()]
        text = json.dumps({"key_type": self.key_type, "columns": columns, "extra": self.extra}, allow_nan=False)
        return seal(text.encode())

    @classmethod
    def from_json(cls, data: Any) -> Schema:
        text = bytes(unseal("the schema", data))
        try:
            found = json.loads(text)
            columns = {name: (tuple(shape), DTYPES[dtype]) for name, shape, dtype in found["columns"]}
            if not isinstance(found["extra"], dict):
                raise TypeError("extra is not a JSON object")
            return cls(found["key_type"], columns, found["extra"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise damaged("the schema", str(error)) from error


@dataclass(frozen=True)
class Layout:
    """Where the columns of a row lie: widest elements first, so that none needs padding before it; rows are as wide as the widest asks."""

    stride: int
    offsets: dict[str, int]

    @classmethod
    def of(cls, schema: Schema) -> Layout:
        sizes = {}
        for name, (shape, dtype) in schema.columns.items():
            sizes[name] = dtype.itemsize
            for n in shape:
                sizes[name] *= n
        offsets, at = {}, 0
        for name in sorted(sizes, key=lambda name: (-schema.columns[name][1].itemsize, name)):
            offsets[name], at = at, at + sizes[name]
        widest = max(dtype.itemsize for _, dtype in schema.columns.values())
        stride = max(1, -(-at // widest)) * widest
        if stride > RECORD:
            raise ValueError(f"store: columns: expected at most {RECORD} bytes a row, got {stride}")
        return cls(stride, offsets)


@dataclass(frozen=True)
class State:
    """What one commit leaves: how many rows are in use, in which segment files."""

    commit: int
    generation: int  # counts the rewrites; rows are numbered from 0 in each
    rows: int
    capacity: int  # rows of a segment
    first_segment: int  # number of the file of row 0
    store: bytes  # 16 random bytes

    def encode(self) -> bytes:
        numbers = (self.commit, self.generation, self.rows, self.capacity, self.first_segment)
        return seal(_STATE.pack(b"MKST", VERSION, *numbers, self.store))

    @classmethod
    def decode(cls, data: Any) -> State:
        if len(data) < 8 or bytes(data[:4]) != b"MKST":
            raise damaged("the state", "no magic")
        check_version("the state", struct.unpack_from("<I", data, 4)[0])
        if len(data) != _STATE.size + 4:
            raise damaged("the state", f"{len(data)} bytes")
        commit, generation, rows, capacity, first, store = _STATE.unpack(unseal("the state", data))[2:]
        if max(commit, generation, rows, capacity, first) >= 1 << 62 or not capacity or not first:
            raise damaged("the state", "a number out of range")
        return cls(commit, generation, rows, capacity, first, store)

    @property
    def segments(self) -> int:
        return -(-self.rows // self.capacity)


@dataclass(frozen=True)
class SegmentHeader:
    store: bytes
    number: int
    generation: int
    first_row: int
    stride: int

    def encode(self) -> bytes:
        numbers = (self.number, self.generation, self.first_row, self.stride)
        packed = _SEGMENT.pack(b"MKSEGMNT", VERSION, HEADER, self.store, *numbers)
        return seal(packed.ljust(HEADER - 4, b"\0"))

    @classmethod
    def decode(cls, what: str, data: Any) -> SegmentHeader:
        if len(data) != HEADER or bytes(data[:8]) != b"MKSEGMNT":
            raise damaged(what, "no segment header")
        check_version(what, struct.unpack_from("<I", data, 8)[0])
        return cls(*_SEGMENT.unpack_from(unseal(what, data))[3:])


@dataclass(frozen=True)
class Marker:
    """The file ENGINE: which engine holds the index, in which file; renamed into place, it is what a rewrite switches."""

    engine: str
    number: int  # of the engine's file
    erase: bool = False  # files that are not in use are overwritten before they are removed

    def encode(self) -> bytes:
        text = f"memkernels-store {VERSION} {self.engine} {self.number} {'erase' if self.erase else 'keep'}"
        return f"{text} {crc32c(text.encode()):08x}\n".encode()

    @classmethod
    def decode(cls, data: bytes) -> Marker:
        try:
            words = data.decode("ascii").removesuffix("\n").split(" ")
            if words[0] != "memkernels-store":
                raise damaged("ENGINE", "no magic")
            check_version("ENGINE", int(words[1]))
            _, _, engine, number, erase, _ = words
            marker = cls(engine, int(number), erase == "erase")
        except (ValueError, IndexError) as error:
            raise damaged("ENGINE", str(error)) from error
        if marker.encode() != data or marker.number < 1:
            raise damaged("ENGINE", "wrong checksum")
        return marker
