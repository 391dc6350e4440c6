"""Checksums compared when they are needed: that of a block of rows at the first reading of any of them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

import torch
from torch import Tensor

from memkernels.store.format import BLOCK, damaged
from memkernels.store.segments import Segments

VERIFY = ("touch", "open", "never")


class Touched:
    """Blocks of rows that were there when the store was opened or refreshed, of which each is read and compared once.

    Blocks end anywhere, so a byte for every 2^shift rows tells in one look whether some of a batch are of blocks still to be compared. Rows
    that this process wrote are not known here.
    """

    def __init__(self, stride: int) -> None:
        self._shift = max(1, BLOCK // stride).bit_length() - 1
        self._first: list[int] = []  # of each block, the first row, and behind its last one
        self._end: list[int] = []
        self._crc: list[int] = []
        self._good: list[bool] = []
        self._due = torch.zeros(1, dtype=torch.bool)  # of each 2^shift rows; the last one stands for all behind
        self._left = 0

    def add(self, row: int, blocks: list[tuple[int, int]]) -> None:
        """Blocks from a row on; a run that joins older ones brings theirs again."""
        if not blocks:
            return
        keep = bisect_left(self._first, row)
        for of_blocks in (self._first, self._end, self._crc, self._good):
            del of_blocks[keep:]
        begin = row
        for rows, crc in blocks:
            self._first.append(row)
            self._end.append(row + rows)
            self._crc.append(crc)
            self._good.append(False)
            row += rows
        places = (row - 1 >> self._shift) + 1
        due = torch.zeros(places + 1, dtype=torch.bool)
        known = self._due[:-1][:places]
        due[: known.shape[0]] = known
        due[begin >> self._shift : places] = True
        self._due, self._left = due, int(due.sum())

    def look(self, rows: Tensor, segments: Segments) -> None:
        """Compares what these rows (negative: none) are the first to need.

        Raises:
            StoreFormatError: a wrong checksum, at every reading of rows of that block. OSError: the disk could not read them.
        """
        if not self._left:
            return
        places = (rows >> self._shift).clamp_(max=self._due.shape[0] - 1)  # -1 is the last one too
        due = self._due[places]
        if not bool(due.any()):
            return
        firsts = torch.tensor(self._first)
        for i in torch.unique(torch.searchsorted(firsts, rows[due], right=True) - 1).tolist():
            if not self._good[i]:
                self._compare(i, segments)
        for place in torch.unique(places[due]).tolist():
            begin, end = place << self._shift, place + 1 << self._shift
            if all(self._good[bisect_right(self._first, begin) - 1 : bisect_left(self._first, end)]):
                self._due[place] = False
                self._left -= 1

    def look_at_all(self, segments: Segments) -> None:
        if self._first:
            self.look(torch.tensor(self._first), segments)
            self._due[:], self._left = False, 0

    def _compare(self, i: int, segments: Segments) -> None:
        first, count = self._first[i], self._end[i] - self._first[i]
        if segments.checksum(first, count) != self._crc[i]:
            name = segments.path(first // segments.state.capacity).name
            raise damaged(name, f"wrong checksum of rows {first} to {first + count}")
        self._good[i] = True
