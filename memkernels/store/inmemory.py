"""What a store without a path keeps: an index, a pool of rows, and for a bounded store when or how often each row was used."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from memkernels._checks import fail
from memkernels.store.columns import Columns
from memkernels.store.index import Index
from memkernels.store.interrupts import uninterrupted
from memkernels.store.keys import KeyBatch, distinct
from memkernels.store.pool import Pool
from memkernels.store.use import POLICIES, Held, Lost, Outcome, Use, Values, distinct_absent, in_slices

NEW, REPLACED, KEPT, ADDED = range(4)  # what `store` did with an element


class InMemory:
    """Keys and rows of values in memory.

    Args:
        key_type, columns, device: as `KeyValueStore` takes them. capacity: the most keys, or None. on_full: "grow", "error", "lru" or
            "lfu".
    """

    def __init__(self, key_type: str, columns: Columns, device: torch.device, capacity: int | None, on_full: str):
        self.key_type, self.columns, self.device = key_type, columns, device
        self.capacity, self.on_full = capacity, on_full
        self.index, self.pool = Index(key_type, device), Pool(columns, device)
        self.use = Use(self, on_full) if on_full in POLICIES else None
        if capacity is not None:
            self.index.reserve(capacity)
            if self.device.type == "cpu":  # where memory that is not written yet costs nothing
                self.pool.reserve(capacity)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def nbytes(self) -> int:
        return self.index.nbytes + self.pool.nbytes + (self.use.nbytes if self.use else 0)

    # --- writing

    def put(self, batch: KeyBatch, values: Values, if_absent: bool, accumulate: bool) -> Outcome:
        """Stores a batch; what was done with each element, and who had to go."""
        if self.on_full == "grow" or self.capacity is None:
            return self._put(batch, values, if_absent, accumulate), None
        if self.use is None:
            self._refuse_more(batch)
            return self._put(batch, values, if_absent, accumulate), None
        if self.pool.fixed:  # refused before anybody goes
            self.pool.reserve(min(self.capacity, len(self) + distinct_absent(batch, self.index.entries(batch) < 0)))

        undo: list[Held] = []

        def put(part: KeyBatch, chosen: Values) -> Outcome:
            gone = self._make_room(part, undo)
            if len(part) < len(batch):  # a later slice may fail
                undo.append(self._held(part.select(distinct(part))))
            return self._put(part, chosen, if_absent, accumulate), gone

        try:
            return in_slices(batch, values, self.capacity, put)
        except BaseException:
            for held in reversed(undo):
                self._restore(held)
            self.use.order = None  # those who were to go first did not go
            raise

    def _make_room(self, batch: KeyBatch, undo: list[Held]) -> Lost | None:
        assert self.use is not None and self.capacity is not None
        rows = self.use.victims(batch, self.capacity)
        if not rows.shape[0]:
            return None
        undo.append(self._held(self.use.keys_at(rows)))
        self.erase(undo[-1].keys)
        return Lost(undo[-1].keys, undo[-1].values)

    def _held(self, batch: KeyBatch) -> Held:
        """Distinct keys as they are now."""
        assert self.use is not None
        rows = self.rows(batch, False)
        times = torch.where(rows < 0, -1, self.use.used[rows.clamp(min=0)]) if self.use.used.shape[0] else rows
        return Held(batch, times, {name: self.pool.read(name, rows, self._zero(name)) for name in self.columns})

    def _restore(self, held: Held) -> None:
        """These keys as they were."""
        assert self.use is not None
        was = held.times >= 0
        self.erase(held.keys.select(~was))
        back = held.keys.select(was)
        self._put(back, {name: value[was] for name, value in held.values.items()}, False, False)
        self.use.used[self.rows(back, False)] = held.times[was]

    def _refuse_more(self, batch: KeyBatch) -> None:
        assert self.capacity is not None
        if len(self) + len(batch) <= self.capacity:
            return
        total = len(self) + distinct_absent(batch, self.index.entries(batch) < 0)
        if total > self.capacity:
            fail("store", "keys", f"at most {self.capacity} keys in the store (capacity, on_full='error')", f"{total} with this batch")

    def _put(self, batch: KeyBatch, values: Values, if_absent: bool, accumulate: bool) -> torch.Tensor:
        numbers = self.pool.numbers
        if self.pool.fixed:  # refused before anything changes
            self.pool.reserve(numbers.end + max(0, distinct_absent(batch, self.index.entries(batch) < 0) - numbers.free.shape[0]))
        before = len(self.index)
        now, old = self.index.assign(batch, numbers.peek(len(batch)))
        now, old = now.to(self.device), old.to(self.device)
        new = old < 0
        numbers.use(len(self.index) - before)
        try:
            self.pool.reserve(numbers.end)
            if self.use:
                self.use.keys_of(batch, now, new)
                self.use.touch(now)
            rows = torch.where(new, now, -1) if if_absent else now
            for name, written in [(name, self.pool.sums(name, now, v, new) if accumulate else (rows, v)) for name, v in values.items()]:
                self.pool.write(name, *written)  # once all of them are there
        except BaseException:  # e.g. no memory: no key is left without its value
            self.erase(batch.select(new))
            raise
        known = KEPT if if_absent else ADDED if accumulate else REPLACED
        return torch.where(new, NEW, known).to(torch.int8)

    def erase(self, batch: KeyBatch) -> torch.Tensor:
        rows = self.index.erase(batch)
        there = rows >= 0
        self.pool.numbers.give_back(rows[there].to(self.device))
        if self.use:
            self.use.forget(rows[there])
        return there

    def clear(self) -> None:
        self.index.clear()
        self.pool.clear()
        self.use = Use(self, self.on_full) if self.use else None

    def replace(self, batch: KeyBatch, values: Values) -> None:
        """These keys and no others."""
        fresh = InMemory(self.key_type, self.columns, self.device, self.capacity, self.on_full)
        fresh.put(batch, values, False, False)
        self._become(fresh)

    close = clear

    def compact(self, erase: bool) -> None:
        """Keys and rows move together into buffers of the size they need; with `erase` what is free is zeros, and so is what is given
        up."""
        if self.pool.fixed:
            self.pool.wipe_free()
            return
        fresh = InMemory(self.key_type, self.columns, self.device, self.capacity, self.on_full)
        fresh.index.reserve(len(self))
        fresh.pool.reserve(len(self))
        used = self.use.used if self.use else None
        for batch, rows in self.index.items():
            rows = rows.to(self.device)
            fresh._put(batch, {name: self.pool.read(name, rows, self._zero(name)) for name in self.columns}, False, False)
            if fresh.use and used is not None:
                fresh.use.used[fresh.index.find(batch)] = used[rows]
        if fresh.use and self.use:
            fresh.use.clock = self.use.clock
            fresh.use.order = None
        fresh.pool.wipe_free()
        self._become(fresh)

    def _become(self, fresh: InMemory) -> None:
        """What this one held is wiped."""
        with uninterrupted():
            self.index.clear()
            self.pool.clear()
            if self.use:
                self.use.wipe()
            self.index, self.pool, self.use = fresh.index, fresh.pool, fresh.use
            if self.use:
                self.use.store = self

    def _zero(self, name: str) -> torch.Tensor:
        shape, dtype = self.columns[name]
        return torch.zeros(1, *shape, dtype=dtype, device=self.device)

    # --- reading

    def rows(self, batch: KeyBatch, touch: bool) -> torch.Tensor:
        rows = self.index.find(batch).to(self.device)
        if touch and self.use:
            self.use.touch(rows[rows >= 0])
        return rows

    def read(self, name: str, rows: torch.Tensor, default: torch.Tensor) -> torch.Tensor:
        return self.pool.read(name, rows, default)

    def items(self) -> Iterator[tuple[KeyBatch, torch.Tensor]]:
        for batch, rows in self.index.items():
            yield batch, rows.to(self.device)
