"""What a store with a path keeps: an index in memory over the rows of a log on disk. Every write takes a new row; a commit makes it
last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from memkernels._checks import fail
from memkernels._freed import wipe_freed
from memkernels.store.columns import Columns, as_bytes, gather, row_bytes
from memkernels.store.index import Index
from memkernels.store.inmemory import ADDED, KEPT, NEW, REPLACED
from memkernels.store.interrupts import uninterrupted
from memkernels.store.key_use import KeyUse
from memkernels.store.keys import KeyBatch, distinct, join
from memkernels.store.log import Log, Schema, StoreError, StoreFormatError
from memkernels.store.pool import wider
from memkernels.store.use import POLICIES, Lost, Outcome, Values, in_slices


class Logged:
    """Keys and rows of values in a log.

    Args:
        log: opened. capacity: the most keys, or None; on_full: what `put` then does, as `KeyValueStore` takes it. verify: as
            `KeyValueStore.open` takes it.
    """

    def __init__(self, log: Log, capacity: int | None, on_full: str, verify: str = "touch"):
        self.log, self.verify = log, verify
        self.capacity = None if on_full == "grow" else capacity
        self.columns: Columns = log.schema.columns
        self.key_type = log.schema.key_type
        self.index = Index(self.key_type)
        self._undo: list[tuple[KeyBatch, torch.Tensor | None, torch.Tensor | None]] = []  # since the last commit: keys, rows and use before
        self.use: KeyUse | None = None
        self._seen: tuple[int, ...] = ()
        self._generation = self._commit = 0  # whose rows the index names, up to which commit
        self._chunks: dict[str, list[torch.Tensor]] = {}
        self._firsts: list[int] = []
        self._replay()
        if on_full in POLICIES and capacity is not None and log.mode == "w":
            self.use = KeyUse(self.key_type, capacity, on_full)
            self._use_as_written(self.use)

    def __len__(self) -> int:
        self._check_whole()
        return len(self.index)

    @property
    def nbytes(self) -> int:
        return self.index.nbytes + (self.use.nbytes if self.use else 0)

    def _use_as_written(self, use: KeyUse) -> None:
        """The order of the rows is that of the writes."""
        found = list(self.index.items())
        if found:
            keys, order = join([batch for batch, _ in found]), torch.argsort(torch.cat([rows for _, rows in found]))
            for part in order.split(1 << 14):
                use.put(keys.select(part))

    def _apply(self, batches: Iterator[tuple[KeyBatch, torch.Tensor]]) -> None:
        for batch, rows in batches:
            if bool((rows < 0).any()):
                last = distinct(batch, last=True)
                batch, rows = batch.select(last), rows[last]
                gone = rows < 0
                self.index.erase(batch.select(gone))
                batch, rows = batch.select(~gone), rows[~gone]
            self.index.upsert(batch, rows)

    def refresh(self) -> bool:
        """For a reader: takes in what was committed since; whether there was anything."""
        before = self._commit
        changes = self.log.refresh()
        try:
            if changes.restart:
                self.index.clear()
                self._undo.clear()
            self._apply(iter(changes))
        except BaseException:  # the index has some of it: not to be read until all of it has come
            self.log.forget_told()
            self._generation = -1
            raise
        self._took_in()
        return changes.restart or before != self._commit

    def _replay(self) -> None:
        self._apply(self.log.replay())
        self._took_in()

    def _took_in(self) -> None:
        self._seen, self._generation, self._commit = (), self.log.generation, self.log.commit_number
        if self.verify == "open":
            self.log.check()

    # --- writing: the log first, which may refuse; then the index, which does not

    def put(self, batch: KeyBatch, values: Values, if_absent: bool, accumulate: bool) -> Outcome:
        """Stores a batch; what was done with each element, and who had to go."""
        use = self.use

        def put(part: KeyBatch, chosen: Values) -> Outcome:
            assert use is not None
            gone = use.victims(part)
            rows = self.index.find(gone)
            lost = Lost(gone, self._row_values(rows)) if len(gone) else None
            status = self._put(part, chosen, if_absent, accumulate)
            if lost:
                self._take_out(gone, rows)
            used = part.select(distinct(part))
            self._undo.append((used, None, use.times(used)))
            use.put(part)
            return status, lost

        with self._whole():
            if use is None or self.capacity is None:
                return self._put(batch, values, if_absent, accumulate), None
            return in_slices(batch, values, self.capacity, put)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What is written inside, or nothing of it when something is raised there."""
        before = len(self._undo)
        try:
            with self.log.whole():
                yield
        except BaseException:
            self._take_back(before)
            if self.use:
                self.use.forget_list()
            raise

    def _put(self, batch: KeyBatch, values: Values, if_absent: bool, accumulate: bool) -> torch.Tensor:
        before = self.index.find(batch)
        first = distinct(batch)
        new = first & (before < 0)
        if self.capacity is not None and self.use is None and len(self) + int(new.sum()) > self.capacity:
            got = f"{len(self) + int(new.sum())} with this batch"
            fail("store", "keys", f"at most {self.capacity} keys in the store (capacity, on_full='error')", got)
        chosen = new if if_absent else first if accumulate else distinct(batch, last=True)
        written = batch.select(chosen)
        if accumulate:
            values = self._sums(batch, before, values, chosen)
        elif not bool(chosen.all()):
            values = {name: value[chosen] for name, value in values.items()}
        rows = self.log.append(written, values) if len(written) else torch.empty(0, dtype=torch.int64)
        self._undo.append((written, before[chosen], None))
        self.index.upsert(written, rows)
        known = KEPT if if_absent else ADDED if accumulate else REPLACED
        return torch.where(new, NEW, known).to(torch.int8)

    def _sums(self, batch: KeyBatch, before: torch.Tensor, values: Values, first: torch.Tensor) -> Values:
        """What there is plus what is added, for each distinct key, in the order of the batch."""
        scratch = Index(self.key_type)
        place, _ = scratch.assign(batch, torch.arange(len(batch)))
        found = {}
        for name, value in values.items():
            wide = wider(value.dtype)
            sums = self.read(name, before[first], torch.zeros(1, *value.shape[1:], dtype=value.dtype)).to(wide)
            found[name] = sums.index_add_(0, place, value.to(wide)).to(value.dtype)
        return found

    def erase(self, batch: KeyBatch) -> torch.Tensor:
        before = self.index.find(batch)
        there = (before >= 0) & distinct(batch)
        gone = batch.select(there)
        with self._whole():
            if len(gone):
                self._take_out(gone, before[there])
        return there

    def _take_out(self, batch: KeyBatch, rows: torch.Tensor) -> None:
        """Distinct keys that are there, with the rows they have."""
        self.log.forget(batch)
        self._undo.append((batch, rows, self.use.times(batch) if self.use else None))
        self.index.erase(batch)
        if self.use:
            self.use.erase(batch)

    def commit(self) -> int:
        with uninterrupted():
            number = self.log.commit()
            self._undo.clear()
        return number

    def rollback(self) -> None:
        """Every key as it was at the last commit."""
        self.log.rollback()
        self._take_back(0)

    def _take_back(self, begin: int) -> None:
        """Every key as it was before these changes; the log knows them no more."""
        for batch, rows, times in reversed(self._undo[begin:]):
            if rows is not None:
                was = rows >= 0
                self.index.erase(batch.select(~was))
                self.index.upsert(batch.select(was), rows[was])
            if self.use and times is not None:
                self.use.restore(batch, times)
        del self._undo[begin:]
        self._seen = ()

    def replace(self, batch: KeyBatch, values: Values) -> None:
        """These keys and no others; the rows of those before stay on disk until `compact`."""
        with self._whole():
            keys = [batch for batch, _ in self.index.items()]
            if keys:
                self.erase(join(keys))
            self.put(batch, values, False, False)

    def compact(self, erase: bool) -> None:
        """Commits, then writes what lives into new files, whose checksums would hide a damage of the old ones."""
        self.commit()
        if problems := self.log.verify().problems:
            raise StoreFormatError(f"store: {self.log.path} is damaged, and is left as it is: {'; '.join(problems[:3])}")
        if erase:
            wipe_freed()  # the new engine takes memory that it does not fill
        held = ((batch, self.index.find(batch)) for batch in self.use.batches()) if self.use else self.index.items()
        try:
            self.log.rewrite(((batch, self._row_values(rows)) for batch, rows in held), erase)
            self.index.clear()
            self._replay()
        except BaseException as error:
            if self.log.generation != self._generation:  # new files, but not yet all of their rows: nothing may be read or written by these
                self._generation = -1
                self.log.refuse(error)
            raise
        if self.use:
            self.use.compact(erase)

    def _row_values(self, rows: torch.Tensor) -> Values:
        return {name: self.read(name, rows, torch.zeros(1, *shape, dtype=dtype)) for name, (shape, dtype) in self.columns.items()}

    def snapshot(self, path: Path) -> None:
        self.log.snapshot(path)

    def close(self) -> None:
        self._chunks.clear()
        self.log.close()
        self.index.clear()
        if self.use:
            self.use.clear()

    # --- reading

    def rows(self, batch: KeyBatch, touch: bool) -> torch.Tensor:
        if touch and self.use:
            self.use.touch(batch)
        self._check_whole()
        return self.index.find(batch)

    def _check_whole(self) -> None:
        """The index has all keys of a commit: a `refresh` or `compact` that fails on its way leaves it with some."""
        if self._generation < 0:
            raise StoreError(f"store: {self.log.path}: the last refresh or compact failed on its way: refresh, or open it again, first")

    def read(self, name: str, rows: torch.Tensor, default: torch.Tensor) -> torch.Tensor:
        shape, dtype = self.columns[name]
        width = row_bytes(shape, dtype)
        if not width:
            return torch.empty(rows.shape[0], *shape, dtype=dtype)
        self._map()
        if self.verify != "never":
            self.log.check(rows)
        return gather((shape, dtype), self._chunks[name], self._firsts, rows, default)

    def _map(self) -> None:
        """The chunks of the log, seen as bytes; asked for again when rows came."""
        now = self.log.generation, self.log.rows, self.log.forks
        if now == self._seen:
            return
        if self.log.generation != self._generation:
            raise StoreError(f"store: {self.log.path} was rewritten: refresh first")
        chunks = [chunk for chunk in self.log.chunks() if chunk.rows]
        self._firsts = [chunk.first_row for chunk in chunks]
        for name, column in self.columns.items():
            self._chunks[name] = [as_bytes(chunk.columns[name], row_bytes(*column)) for chunk in chunks] if row_bytes(*column) else []
        self._seen = now

    def items(self) -> Iterator[tuple[KeyBatch, torch.Tensor]]:
        self._check_whole()
        return self.index.items()


def create(path: Path, key_type: str, columns: Columns, extra: dict[str, object], durability: str) -> Log:
    return Log.create(path, Schema(key_type, columns, extra), durability)


def write_snapshot(
    path: Path, key_type: str, columns: Columns, extra: dict[str, object], batches: Iterator[tuple[KeyBatch, Values]]
) -> None:
    """A new store on disk that holds these batches."""
    with create(path, key_type, columns, extra, "commit") as log:
        for batch, values in batches:
            log.append(batch, {name: value.cpu().contiguous() for name, value in values.items()})
        log.commit()
