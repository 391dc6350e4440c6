"""Index: from keys to rows. A hash table in a tensor that grows in small steps, and for byte keys the bytes they are compared with."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from memkernels.ops import ByteKeys, store_erase_, store_find, store_items, store_move_, store_upsert_
from memkernels.store.buffers import fresh, grown, wipe
from memkernels.store.keys import MOST_BYTES, KeyBatch, gather_runs, offsets_of, runs
from memkernels.store.numbers import RowNumbers

PLACES = 5  # keys in a bucket
MOST_LOAD, GROWTH = 0.85, 1.5  # 15 bytes an entry in a full table, 22.6 in one that has just grown
LEAST_BUCKETS = 4
LEAST_STEP = 256  # buckets of the old table that a call moves at least
MOVED = 2  # buckets a key of a larger batch: half as long as the batch itself takes, and sooner there is one table to look into again
LENGTH_BITS = MOST_BYTES.bit_length()  # of a span, behind the bits of its begin
SAMPLE = 1024  # keys of a large batch that are looked up before all of it is


class Index:
    """Rows of keys.

    `upsert` and `erase` follow the order of the batch, as a loop over a dict would. While the table grows there are two: every call that
    writes moves twice as many buckets of the old one as it has keys (at least 256), so no call waits for all of it.

    Args:
        key_type: "int64", "bytes" or "str". device: of the table; byte keys live on the CPU. size: keys to make room for.

    Example:
        >>> from memkernels.store.index import Index
        >>> from memkernels.store.keys import as_batch
        >>> index = Index("str")
        >>> index.upsert(as_batch("", "str", ["apple", "pear"]), torch.tensor([3, 4]))
        tensor([-1, -1])
        >>> index.find(as_batch("", "str", ["pear", "plum"]))
        tensor([ 4, -1])
    """

    def __init__(self, key_type: str = "int64", device: torch.device | str = "cpu", size: int = 0):
        self.key_type, self.device = key_type, torch.device(device) if key_type == "int64" else torch.device("cpu")
        self.count = 0
        self.table = self._new_table(self._buckets(size))
        self.old: torch.Tensor | None = None  # the table that is being given up; buckets below `moved` are empty
        self.moved = 0
        self.texts = None if key_type == "int64" else Texts()

    def _buckets(self, count: int) -> int:
        return max(LEAST_BUCKETS, math.ceil(count / (PLACES * MOST_LOAD)))

    def _new_table(self, buckets: int) -> torch.Tensor:
        return fresh((buckets, 8), torch.int64, self.device).zero_()

    def __len__(self) -> int:
        return self.count

    @property
    def nbytes(self) -> int:
        """Bytes of the tables and of what byte keys need."""
        return sum(t.nbytes for t in self.tables()) + (self.texts.nbytes if self.texts else 0)

    def tables(self) -> list[torch.Tensor]:
        return [self.table] if self.old is None else [self.table, self.old]

    # --- keys

    def _keys(self, batch: KeyBatch) -> tuple[torch.Tensor, ByteKeys | None]:
        keys, second = batch.hashed()
        return keys.to(self.device), None if self.texts is None else self.texts.compared(batch, second)

    def find(self, batch: KeyBatch) -> torch.Tensor:
        """rows "n"; -1 where the key is not there."""
        rows = self.entries(batch)
        return rows if self.texts is None else self.texts.rows_of(rows)

    def entries(self, batch: KeyBatch) -> torch.Tensor:
        """What the table holds: rows, or for byte keys the numbers of their entries."""
        keys, byte_keys = self._keys(batch)
        rows = store_find(self.table, keys, byte_keys)
        if self.old is not None:
            rows = torch.where(rows < 0, store_find(self.old, keys, byte_keys), rows)
        return rows

    def upsert(self, batch: KeyBatch, rows: torch.Tensor, keep: bool = False) -> torch.Tensor:
        """Keys now have these rows; with `keep`, those that are there keep theirs. Returns the rows before, -1 for keys that were not
        there."""
        if self.texts is not None:
            before, numbers = self.count, self.texts.numbers
            now, old = self._assign(batch, numbers.peek(len(batch)))
            numbers.use(self.count - before)
            return self.texts.set_rows(now, old, rows, keep)
        keys, _ = self._prepare(batch)
        _, old = store_upsert_(self.table, keys, rows.to(self.device), "keep" if keep else "replace")
        self._count(old)
        return old

    def assign(self, batch: KeyBatch, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """New keys get `rows` in order; never to be mixed with `upsert`. Returns the rows now, and before: -1 for the first of a new
        key."""
        return self._assign(batch, rows)

    def _assign(self, batch: KeyBatch, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.texts is not None and self.texts.lacks_room(batch.data.shape[0], rows):  # type: ignore[union-attr]
            absent = self.entries(batch) < 0  # before the table names them: there may be no memory for their bytes
            self.texts.make_room(int(batch.lengths()[absent].sum()), rows[: int(absent.sum())])
        keys, byte_keys = self._prepare(batch)
        now, old = store_upsert_(self.table, keys, rows.to(self.device), "assign", byte_keys)
        new = self._count(old)
        if self.texts is not None and new == len(batch):
            self.texts.add(batch, byte_keys.second, now)  # type: ignore[union-attr]
        elif self.texts is not None and new:
            fresh = old < 0
            self.texts.add(batch.select(fresh), byte_keys.second[fresh], now[fresh])  # type: ignore[union-attr]
        return now, old

    def erase(self, batch: KeyBatch) -> torch.Tensor:
        """Takes keys out; the rows they had, -1 where there was none."""
        keys, byte_keys = self._prepare(batch, growing=False)
        removed = store_erase_(self.table, keys, byte_keys)
        there = removed >= 0
        self.count -= int(there.sum())
        if self.texts is None:
            return removed
        rows = self.texts.rows_of(removed)
        self.texts.remove(removed[there])
        return rows

    def _count(self, old: torch.Tensor) -> int:
        """Takes new keys into the count; how many there are."""
        new = old.tolist().count(-1) if old.shape[0] <= 16 else int((old == -1).sum())  # for a few, calls of torch take longer
        self.count += new
        return new

    # --- growth

    def _prepare(self, batch: KeyBatch, growing: bool = True) -> tuple[torch.Tensor, ByteKeys | None]:
        """Room for the batch, a step of a growth under way, and none of its keys in the old table any more."""
        if growing:
            self._make_room(batch)
        keys, byte_keys = self._keys(batch)
        if self.old is not None:
            self._move(max(LEAST_STEP, MOVED * len(batch)))
        if self.old is not None and bool((store_find(self.old, keys, byte_keys) >= 0).any()):
            removed = store_erase_(self.old, keys, byte_keys)
            there = removed >= 0
            store_upsert_(self.table, keys[there], removed[there], "insert")
        return keys, byte_keys

    def _fits(self, count: int) -> bool:
        return count <= MOST_LOAD * PLACES * self.table.shape[0]

    def _make_room(self, batch: KeyBatch) -> None:
        if self._fits(self.count + len(batch)):
            return
        new = self._absent(batch) if self.count else len(batch)
        if self._fits(self.count + new):
            return
        self.reserve(self.count + new)

    def _absent(self, batch: KeyBatch) -> int:
        """How many keys of a batch are not there; all of them where a sample of a large batch has none that is."""
        if len(batch) >= 8 * SAMPLE:
            places = torch.arange(0, len(batch), len(batch) // SAMPLE)
            some = batch.select(places if batch.ints is None else places.to(batch.ints.device))
            if bool((self.entries(some) < 0).all()):
                return len(batch)
        return int((self.entries(batch) < 0).sum())

    def reserve(self, count: int) -> None:
        """Room for `count` keys without another growth."""
        if self._fits(count):
            return
        if self.old is not None:
            self._move(self.old.shape[0])
        table = self._new_table(max(self._buckets(count), int(GROWTH * self.table.shape[0])))  # before anything changes: it may be too much
        self.old, self.moved = self.table if self.count else None, 0
        self.table = table

    def _move(self, buckets: int) -> None:
        """Moves the next buckets of the old table, in the order of the hash, which is the order of the new table too."""
        assert self.old is not None
        end = min(self.moved + buckets, self.old.shape[0])
        store_move_(self.old, self.table, self.moved, end)
        self.moved = end
        if end == self.old.shape[0]:
            self.old = None

    # --- all of it

    def items(self, step: int = 1 << 14) -> Iterator[tuple[KeyBatch, torch.Tensor]]:
        """All keys and rows, a run of buckets at a time, in the order of the table. Nothing may be written meanwhile."""
        for table in self.tables():
            for begin in range(0, table.shape[0], step):
                keys, rows = store_items(table, begin, min(begin + step, table.shape[0]))
                if not keys.numel():
                    continue
                if self.texts is None:
                    yield KeyBatch("int64", keys), rows
                else:
                    yield self.texts.batch(self.key_type, rows), self.texts.rows_of(rows)

    def clear(self) -> None:
        """No keys; what the tables held is wiped."""
        for table in self.tables():
            wipe(table)
        if self.texts is not None:
            self.texts.clear()
        self.__init__(self.key_type, self.device)  # type: ignore[misc]


class Texts:
    """The bytes of byte keys, and a row for each of these entries."""

    def __init__(self) -> None:
        self.numbers = RowNumbers()
        self.spans = torch.zeros(0, 2, dtype=torch.int64)  # of each entry: begin << 24 | length of its bytes; second half of their hash
        self.rows = torch.zeros(0, dtype=torch.int64)
        self.arena, self.end = torch.zeros(0, dtype=torch.uint8), 0
        self.dead = 0  # bytes of the arena that belong to no entry

    @property
    def nbytes(self) -> int:
        return self.spans.nbytes + self.rows.nbytes + self.arena.nbytes + self.numbers.nbytes

    def compared(self, batch: KeyBatch, second: torch.Tensor | None) -> ByteKeys:
        assert batch.data is not None and batch.offsets is not None and second is not None
        return ByteKeys(self.spans, self.arena, batch.data, batch.offsets, second)

    def _spans(self, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the bytes of entries begin, and how many they are."""
        spans = self.spans[entries, 0]
        return spans >> LENGTH_BITS, spans & MOST_BYTES

    def rows_of(self, entries: torch.Tensor) -> torch.Tensor:
        if not self.numbers.end:  # rows are entries
            return entries
        return torch.where(entries < 0, entries, self.rows[entries.clamp(min=0)])

    def lacks_room(self, size: int, entries: torch.Tensor) -> bool:
        return self.end + size > self.arena.shape[0] or _end_of(entries) > min(self.spans.shape[0], self.rows.shape[0])

    def make_room(self, size: int, entries: torch.Tensor) -> None:
        """For bytes of new keys, and for entries of these numbers."""
        last = _end_of(entries)
        number = max(last, int(GROWTH * self.rows.shape[0]), 64)
        if last > self.spans.shape[0]:
            self.spans = grown(self.spans, number)
        if last > self.rows.shape[0]:  # not at once with the spans: each is whole when there is no memory for the other
            self.rows = grown(self.rows, number)
        if self.end + size > self.arena.shape[0] and 2 * self.dead > self.end:
            self._close_gaps()
        end = self.end + size
        if end >> 63 - LENGTH_BITS:
            raise MemoryError(f"store: expected less than {1 << 63 - LENGTH_BITS} bytes of keys, got {end}")
        if end > self.arena.shape[0]:
            self.arena = grown(self.arena, max(end, int(GROWTH * self.arena.shape[0]), 1024))

    def add(self, batch: KeyBatch, second: torch.Tensor, entries: torch.Tensor) -> None:
        """The bytes of new keys, for which there is room, and the second halves of their hashes."""
        assert batch.data is not None and batch.offsets is not None
        end = self.end + batch.data.shape[0]
        self.arena[self.end : end] = batch.data
        begins = batch.offsets[:-1] + self.end
        self.spans[entries] = torch.stack([begins << LENGTH_BITS | batch.lengths(), second], 1)
        self.end = end

    def set_rows(self, entries: torch.Tensor, before: torch.Tensor, rows: torch.Tensor, keep: bool) -> torch.Tensor:
        """Each entry has the last of its rows (`keep`: a new one the first). Returns the row before each element."""
        fresh = before < 0
        if keep:
            self.rows[entries[fresh]] = rows[fresh]
            return torch.where(fresh, before, self.rows[entries])
        order = torch.argsort(entries, stable=True)
        repeated = torch.zeros_like(fresh)
        repeated[order[1:]] = entries[order][1:] == entries[order][:-1]
        previous = torch.empty_like(rows)
        previous[order[1:]] = rows[order][:-1]
        old = torch.where(repeated, previous, torch.where(fresh, -1, self.rows[entries]))
        final = torch.ones_like(fresh)
        final[order[:-1]] = entries[order][1:] != entries[order][:-1]
        self.rows[entries[final]] = rows[final]
        return old

    def remove(self, entries: torch.Tensor) -> None:
        begins, lengths = self._spans(entries)
        self.arena[runs(begins, lengths)] = 0
        self.dead += int(lengths.sum())
        self.spans[entries] = 0
        if self.numbers.end:  # they are given out here, by `upsert`, and have rows
            self.rows[entries] = -1
            self.numbers.give_back(entries)

    def _close_gaps(self) -> None:
        """Half of the arena or more is of keys that are gone: those that are there move to its front, and it need not grow."""
        held = (self.spans[:, 0] & MOST_BYTES).nonzero()[:, 0]
        begins, lengths = self._spans(held)
        kept = gather_runs(self.arena, begins, lengths)
        end = kept.shape[0]
        self.arena[:end] = kept
        self.arena[end : self.end] = 0
        self.spans[held, 0] = offsets_of(lengths)[:-1] << LENGTH_BITS | lengths
        self.end, self.dead = end, 0
        wipe(kept)

    def batch(self, key_type: str, entries: torch.Tensor) -> KeyBatch:
        begins, lengths = self._spans(entries)
        return KeyBatch(key_type, None, gather_runs(self.arena, begins, lengths), offsets_of(lengths))

    def clear(self) -> None:
        for tensor in (self.arena, self.spans, self.rows):
            wipe(tensor)


def _end_of(entries: torch.Tensor) -> int:
    """One more than the largest number of an entry."""
    if len(entries) <= 16:  # calls of torch take longer
        return max(entries.tolist(), default=-1) + 1
    return int(entries.max()) + 1
