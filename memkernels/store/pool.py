"""Pool: rows of values in memory, in chunks, so that growing copies nothing that is large."""

from __future__ import annotations

import torch

from memkernels._checks import fail
from memkernels.ops import store_scatter_
from memkernels.store.buffers import fresh, wipe
from memkernels.store.columns import Columns, as_bytes, gather, row_bytes
from memkernels.store.numbers import RowNumbers

CHUNK_BYTES = 64 << 20  # of the widest column
LEAST_ROWS, MOST_ROWS = 64, 1 << 22  # rows of the first chunk, which grows, and of every later one at most


def wider(dtype: torch.dtype) -> torch.dtype:
    """What values of this dtype are added up in; torch adds no float8 and no wide unsigned ones."""
    if dtype.is_floating_point and dtype.itemsize < 4:
        return torch.float32
    return torch.int64 if dtype in (torch.uint16, torch.uint32, torch.uint64) else dtype


class Pool:
    """The values of the keys of a store, by row number.

    Args:
        columns: {name: (shape, dtype)}. device: where the values live.
    """

    def __init__(self, columns: Columns, device: torch.device):
        self.columns, self.device, self.numbers = columns, device, RowNumbers(device)
        widest = max([row_bytes(*column) for column in columns.values()] + [1])
        self.chunk_rows = 1 << (max(1, min(MOST_ROWS, CHUNK_BYTES // widest)).bit_length() - 1)
        self.chunks: dict[str, list[torch.Tensor]] = {name: [] for name in columns}
        self.rows = 0  # that the chunks hold
        self._seen: dict[str, tuple[list[torch.Tensor], list[int]]] = {}
        self.fixed = False  # one tensor in somebody's hands: no growth

    @property
    def nbytes(self) -> int:
        return sum(chunk.nbytes for chunks in self.chunks.values() for chunk in chunks) + self.numbers.nbytes

    def reserve(self, rows: int) -> None:
        """Chunks for `rows` rows. The first one grows by four up to its full size; then there is one more after another."""
        if rows <= self.rows:
            return
        if self.fixed:
            fail("store", "keys", f"at most {self.rows} rows, which the parameter of as_parameter() holds", f"{rows} rows")
        self._seen.clear()
        if self.rows < self.chunk_rows:
            size = min(self.chunk_rows, max(rows, 4 * self.rows, LEAST_ROWS))
            for name, (shape, dtype) in self.columns.items():
                first = fresh((size, *shape), dtype, self.device)
                for before in self.chunks[name]:
                    first[: self.rows] = before
                    wipe(before)
                self.chunks[name] = [first]
            self.rows = size
        while self.rows < rows:
            for name, (shape, dtype) in self.columns.items():
                self.chunks[name].append(fresh((self.chunk_rows, *shape), dtype, self.device))
            self.rows += self.chunk_rows

    def _bytes(self, name: str) -> tuple[list[torch.Tensor], list[int]]:
        """The chunks of a column seen as bytes, and the first row of each; kept until there are other chunks."""
        if name not in self._seen:
            width = row_bytes(*self.columns[name])
            firsts = [i * self.chunk_rows for i in range(len(self.chunks[name]))]
            self._seen[name] = [as_bytes(chunk.detach(), width) for chunk in self.chunks[name]], firsts
        return self._seen[name]

    def read(self, name: str, rows: torch.Tensor, default: torch.Tensor) -> torch.Tensor:
        """The values of `rows` in a column, `default` "1 ..." where the row is negative."""
        shape, dtype = self.columns[name]
        width = row_bytes(shape, dtype)
        if not width:
            return torch.empty(rows.shape[0], *shape, dtype=dtype, device=self.device)
        chunks, firsts = self._bytes(name)
        return gather((shape, dtype), chunks, firsts, rows, default)

    def write(self, name: str, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Of equal rows the last one stays; a negative row is left out."""
        width = row_bytes(*self.columns[name])
        if width and rows.shape[0]:
            chunks, firsts = self._bytes(name)
            store_scatter_(chunks, firsts, rows, as_bytes(values, width))

    def sums(self, name: str, rows: torch.Tensor, values: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Distinct rows, and what is in each plus what is added to it, in the order of the batch, in `wider` types; a row begins at zero
        where `new` is true."""
        shape, dtype = self.columns[name]
        distinct, place = torch.unique(rows, return_inverse=True)
        begins_at_zero = torch.zeros_like(distinct, dtype=torch.bool)
        begins_at_zero[place[new]] = True
        zero = torch.zeros(1, *shape, dtype=dtype, device=self.device)
        sums = self.read(name, torch.where(begins_at_zero, -1, distinct), zero)
        wide = wider(dtype)
        return distinct, sums.to(wide).index_add_(0, place, values.to(wide)).to(dtype)

    def as_one(self, rows: int) -> None:
        """Every column in one chunk of `rows` rows, which then stays as it is."""
        self._seen.clear()
        for name, (shape, dtype) in self.columns.items():
            one = fresh((rows, *shape), dtype, self.device)
            one.zero_()
            end = 0
            for chunk in self.chunks[name]:
                kept = chunk[: max(0, min(chunk.shape[0], rows - end))]
                one[end : end + kept.shape[0]] = kept
                end += chunk.shape[0]
                wipe(chunk)
            self.chunks[name] = [one]
        self.rows = self.chunk_rows = rows
        self.fixed = True

    def wipe_free(self) -> None:
        """Zeros in every row that was freed; those beyond the last one given out never held a value."""
        free = self.numbers.free
        for name, (shape, dtype) in self.columns.items():
            self.write(name, free, torch.zeros(free.shape[0], *shape, dtype=dtype, device=self.device))

    def clear(self) -> None:
        """No rows; what the chunks held is wiped."""
        for chunks in self.chunks.values():
            for i, chunk in enumerate(chunks):
                wipe(chunk[: max(0, self.numbers.end - i * self.chunk_rows)])
        self.__init__(self.columns, self.device)  # type: ignore[misc]
