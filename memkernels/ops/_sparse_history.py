"""The rows of a `SparseMemory` and what they held before each write, so that back-propagation can put it back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Entry(NamedTuple):
    """One write: the rows it touched, "B M", and what they hold where the memory is not now: before it, or, undone, after it."""

    places: Tensor
    rows: Tensor


class History:
    """What the graph of a memory keeps. It knows nothing of the memory, whose token knows the graph: no circle, so both go at once."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.log: list[Entry | None] = []  # None: a write that was not logged
        self.undone: list[Entry] = []
        self.gradient: Tensor | None = None

    def write(self, index: Tensor, weights: Tensor, add: Tensor, clear: Tensor, logged: bool) -> None:
        touched = torch.cat([index.flatten(1), clear], 1)
        self.log.append(Entry(touched, take(self.rows, touched)) if logged else None)
        put(self.rows, clear, self.rows.new_zeros(()).expand(*clear.shape, self.rows.shape[2]))
        put(self.rows, index.flatten(1), (weights[..., None] * add[:, :, None]).flatten(1, 2), accumulate=True)

    def rewind(self, op: str, time: int) -> Tensor:
        """The memory as it was after that many writes; returns the buffer of its gradient."""
        if len(self.log) < time:
            raise RuntimeError(f"{op}: backward ran before and has undone these steps; it can run once")
        while len(self.log) > time:
            entry = self.log.pop()
            if entry is None:
                raise RuntimeError(f"{op}: backward needs the memory before a step that ran under torch.no_grad and kept no log")
            self.undone.append(Entry(entry.places, take(self.rows, entry.places)))
            put(self.rows, entry.places, entry.rows)
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.rows)  # pages are touched where rows are
        return self.gradient

    def restore(self) -> None:
        """The last state again, and what led to it forgotten."""
        while self.undone:
            entry = self.undone.pop()
            put(self.rows, entry.places, entry.rows)
        self.log, self.gradient = [], None

    def check_step(self, op: str) -> None:
        if self.gradient is not None or self.undone:
            raise RuntimeError(f"{op}: memory: backward has undone its steps, expected detach_() before the next one")


def take(rows: Tensor, index: Tensor) -> Tensor:
    """Rows of "B N W" that an index "B ..." names."""
    flat = index.flatten(1)
    return rows.gather(1, flat[..., None].expand(-1, -1, rows.shape[2])).unflatten(1, index.shape[1:])


def put(rows: Tensor, index: Tensor, values: Tensor, accumulate: bool = False) -> None:
    """Overwrites, or adds to, rows "B M"; equal places are added up in their order."""
    entry = torch.arange(rows.shape[0], device=rows.device)[:, None].expand_as(index)
    rows.index_put_((entry, index), values, accumulate)
