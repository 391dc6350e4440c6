"""Reads an LMDB file without LMDB, which follows any page number and any offset it finds: only a sound tree is given to it.

Checked: both meta pages, every page of both trees that the newest one reaches (numbers, kinds, bounds of every node, order of keys, depth),
the overflow pages of large values, and that no free page is in use. The values have checksums of their own.
"""

from __future__ import annotations

import itertools
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

from memkernels.store import disk
from memkernels.store.errors import StoreFormatError
from memkernels.store.format import damaged

_PAGE = struct.Struct("<QHHHH")  # number, pad, flags, lower and upper (or how many overflow pages)
_META = struct.Struct("<IIQQ")  # magic, version, address, bytes of the map; two trees, last page, transaction
_TREE = struct.Struct("<IHHQQQQQ")  # pad, flags, depth, branch, leaf and overflow pages, entries, root
_NODE = struct.Struct("<HHHH")
_MAGIC, _NONE, _HEAD = 0xBEEFC0DE, (1 << 64) - 1, _PAGE.size
_BRANCH, _LEAF, _OVERFLOW, _METAPAGE, _INTEGER_KEY, _BIG, _NO_FOLDER = 1, 2, 4, 8, 8, 1, 0x4000


def check(path: Path) -> None:
    """StoreFormatError when LMDB should not open this file. A writer may commit meanwhile: then it is read again."""
    fd = disk.open_file(path, os.O_RDONLY)
    try:
        for attempt in range(1000):
            before = _transactions(fd)
            try:
                _Check(path.name, fd).run()
                return
            except StoreFormatError:
                if attempt == 999 or _transactions(fd) == before:
                    raise
    finally:
        os.close(fd)


def _transactions(fd: int) -> list[bytes]:
    return [disk.read_at(fd, 8, size + 144) for size in (0, *(512 << i for i in range(8)))]


@dataclass
class _Meta:
    version: int
    address: int
    map_bytes: int
    trees: list[tuple[int, ...]]
    last: int
    transaction: int


@dataclass
class _Check:
    name: str
    fd: int
    size: int = 0
    last: int = 0
    used: set[int] = field(default_factory=set)

    def bad(self, why: str) -> StoreFormatError:
        return damaged(self.name, why)

    def need(self, true: bool, why: str) -> None:
        if not true:
            raise self.bad(why)

    def meta(self, data: bytes) -> _Meta:
        self.need(len(data) >= _HEAD + 136, "no meta page")
        self.need(_PAGE.unpack_from(data)[2] & _METAPAGE != 0, "a meta page of another kind")
        magic, version, address, map_bytes = _META.unpack_from(data, _HEAD)
        self.need(magic == _MAGIC, "no LMDB file")
        trees = [_TREE.unpack_from(data, _HEAD + 24 + 48 * i) for i in (0, 1)]
        return _Meta(version, address, map_bytes, trees, *struct.unpack_from("<QQ", data, _HEAD + 120))

    def run(self) -> None:
        first = self.meta(disk.read_at(self.fd, 4096, 0))
        self.size = first.trees[0][0]
        self.need(self.size in [512 << i for i in range(8)], f"pages of {self.size} bytes")
        metas = [first, self.meta(disk.read_at(self.fd, 4096, self.size))]
        for meta in metas:
            self.need(meta.version == 1, f"version {meta.version} of LMDB's format")
            self.need(
                meta.trees[0][0] == self.size and meta.trees[0][1] & ~_NO_FOLDER == _INTEGER_KEY and not meta.address, "unknown flags"
            )
            self.need(meta.trees[1][1] == 0 and meta.map_bytes <= 1 << 46, "unknown flags")
        newest = max(metas, key=lambda meta: meta.transaction)
        self.need(newest.transaction < 1 << 62 and metas[newest.transaction & 1].transaction == newest.transaction, "meta pages exchanged")
        # Each commit overwrites the older one: else the newest is lost, and an earlier one would be taken for it.
        follows = abs(metas[0].transaction - metas[1].transaction) == 1 or not newest.transaction
        self.need(follows, "meta pages of commits that do not follow each other")
        self.last = newest.last
        self.need(self.last <= newest.map_bytes // self.size, "more pages than its map")
        free, main = newest.trees
        self.tree(main, False)
        for _, data in self.tree(free, True):
            self.free(data)

    def page(self, number: int) -> bytes:
        self.need(2 <= number <= self.last and number not in self.used, f"page {number} out of range or in use twice")
        self.used.add(number)
        data = disk.read_at(self.fd, self.size, number * self.size)
        self.need(len(data) == self.size, f"page {number} is behind the end")
        self.need(_PAGE.unpack_from(data)[0] == number, f"page {number} has another number")
        return data

    def tree(self, tree: tuple[int, ...], integers: bool) -> list[tuple[bytes, bytes]]:
        """The entries of the free list; of the other tree, nothing."""
        _, _, depth, *_, entries, root = tree
        if root == _NONE:
            self.need(not entries and not depth, "entries without pages")
            return []
        self.need(1 <= depth <= 32, f"a tree of {depth} levels")
        kept: list[tuple[bytes, bytes]] = []
        count, last_key = 0, b""
        pending = [(root, depth)]
        while pending:
            number, level = pending.pop()
            data = self.page(number)
            nodes = self.nodes(number, data, level)
            if level > 1:
                pending += [(child, level - 1) for _, child, _ in reversed(nodes)]
                continue
            for key, size, at in nodes:
                order = key[::-1] if integers else key
                self.need(not count or order > last_key, f"keys out of order in page {number}")
                self.need(not integers or len(key) == 8, f"a wrong key in page {number}")
                last_key, count = order, count + 1
                value = self.value(data, size, at, integers)
                if integers:
                    kept.append((key, value))
        self.need(count == entries, f"{count} entries of {entries}")
        return kept

    def nodes(self, number: int, data: bytes, level: int) -> list[tuple[bytes, int, int]]:
        """(key, child, 0) of a branch; (key, bytes of the value or ~bytes of a large one, offset of it) of a leaf."""
        _, _, flags, lower, upper = _PAGE.unpack_from(data)
        self.need(flags == (_BRANCH if level > 1 else _LEAF), f"page {number} is of another kind")
        self.need(_HEAD < lower <= upper <= self.size and lower % 2 == 0, f"bounds of page {number}")
        self.need(level == 1 or lower >= _HEAD + 4, f"a branch page {number} of one child")
        out, spans = [], []
        for at in struct.unpack_from(f"<{(lower - _HEAD) // 2}H", data, _HEAD):
            self.need(upper <= at <= self.size - 8 and at % 2 == 0, f"a node of page {number}")
            low, high, kind, key_size = _NODE.unpack_from(data, at)
            end = at + 8 + key_size
            self.need(end <= self.size and key_size <= 511, f"a key of page {number}")
            key = data[at + 8 : end]
            if level > 1:
                out.append((key, low | high << 16 | kind << 32, 0))
            else:
                size, big = low | high << 16, kind == _BIG
                self.need(kind in (0, _BIG) and end + (8 if big else size) <= self.size, f"a value of page {number}")
                out.append((key, ~size if big else size, end))
                end += 8 if big else size
            spans.append((at, end))
        spans.sort()
        self.need(all(a[1] <= b[0] for a, b in itertools.pairwise(spans)), f"nodes of page {number} overlap")
        return out

    def value(self, data: bytes, size: int, at: int, whole: bool) -> bytes:
        """What lies there; of a large value only its pages are checked, unless all of it is asked for."""
        if size >= 0:
            return data[at : at + size]
        size, number = ~size, struct.unpack_from("<Q", data, at)[0]
        self.need(2 <= number <= self.last, f"a large value in page {number}")
        head = disk.read_at(self.fd, _HEAD, number * self.size)
        self.need(len(head) == _HEAD, f"page {number} is behind the end")
        found, _, flags, low, high = _PAGE.unpack(head)
        pages = low | high << 16
        self.need((found, flags) == (number, _OVERFLOW) and _HEAD + size <= pages * self.size, f"a large value in page {number}")
        self.need(number + pages - 1 <= self.last, f"a large value behind the last page: {number}")
        end = (number + pages) * self.size
        self.need(os.fstat(self.fd).st_size >= end, f"page {number} is behind the end")
        span = range(number, number + pages)
        self.need(self.used.isdisjoint(span), f"page {number} is in use twice")
        self.used.update(span)
        return disk.read_at(self.fd, size, number * self.size + _HEAD) if whole else b""

    def free(self, data: bytes) -> None:
        """A list of free pages: how many, then their numbers, falling."""
        count = struct.unpack_from("<Q", data)[0] if len(data) >= 8 else _NONE
        self.need(count <= len(data) // 8 - 1, "a list of free pages that is too short")
        numbers = struct.unpack_from(f"<{count}Q", data, 8)
        self.need(all(2 <= n <= self.last for n in numbers), "free pages out of range")
        self.need(all(a > b for a, b in itertools.pairwise(numbers)), "free pages out of order")
        self.need(self.used.isdisjoint(numbers), "free pages in use")
        self.used.update(numbers)
