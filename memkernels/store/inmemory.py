"""What a store without a path keeps: an index, a pool of rows, and for a bounded store when or how often each row was used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from memkernels._checks import fail
from memkernels.store.buffers import grown, wipe
from memkernels.store.columns import Columns
from memkernels.store.index import Index
from memkernels.store.keys import KeyBatch, join
from memkernels.store.pool import Pool

NEW, REPLACED, KEPT, ADDED = range(4)  # what `store` did with an element
Values = dict[str, torch.Tensor]


class Evicted(NamedTuple):
    """Keys that made room for others, with the values they had."""

    keys: KeyBatch
    values: Values


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
        self.use = Use(self, on_full) if on_full in ("lru", "lfu") else None
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

    def put(self, batch: KeyBatch, values: Values, if_absent: bool, accumulate: bool) -> tuple[torch.Tensor, Evicted | None]:
        """Stores a batch; what was done with each element, and who had to go."""
        if self.on_full == "grow" or self.capacity is None:
            return self._put(batch, values, if_absent, accumulate), None
        if self.use is None:
            self._refuse_more(batch)
            return self._put(batch, values, if_absent, accumulate), None
        states, gone = [], []
        for begin in range(0, len(batch), self.capacity):  # a slice always fits, and evicts none of its own keys
            some = torch.arange(begin, min(begin + self.capacity, len(batch)))
            part = batch.select(some.to(self.device if batch.ints is not None else "cpu"))
            gone.append(self.use.make_room(part, self.capacity))
            chosen = {name: value[begin : begin + self.capacity] for name, value in values.items()}
            states.append(self._put(part, chosen, if_absent, accumulate))
        status = torch.cat(states) if states else torch.empty(0, dtype=torch.int8, device=self.device)
        lost = [e for e in gone if e is not None]
        if not lost:
            return status, None
        return status, Evicted(join([e.keys for e in lost]), {name: torch.cat([e.values[name] for e in lost]) for name in self.columns})

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
            for name, value in values.items():
                if accumulate:
                    self.pool.add(name, now, value, new)
                else:
                    self.pool.write(name, torch.where(new, now, -1) if if_absent else now, value)
        except BaseException:  # e.g. no memory: no key is left without its value
            numbers.give_back(self.index.erase(batch.select(new.to(self.index.device))).to(self.device))
            raise
        if self.use:
            self.use.keys_of(batch, now, new)
            self.use.touch(now)
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


def distinct_absent(batch: KeyBatch, absent: torch.Tensor) -> int:
    """How many different keys of a batch are absent."""
    missing = batch.select(absent)
    return int(torch.unique(missing.ints).shape[0]) if missing.ints is not None else len(set(missing.tolist()))


class Use:
    """Which row goes first when the store is full: the one used longest ago ("lru") or least often ("lfu"); of equal ones the lowest row.

    Of rows used longest ago a list is made now and then and gone through, leaving out rows that were used since; least often used ones are
    searched for in all rows each time.
    """

    def __init__(self, store: InMemory, policy: str):
        self.store, self.policy, self.clock = store, policy, 0
        self.used = torch.zeros(0, dtype=torch.int64, device=store.device)  # time of the last use, or count of uses; -1: a free row
        self.keys = torch.zeros(0, dtype=torch.int64, device=store.device)
        self.order: torch.Tensor | None = None
        self.seen = self.used  # `used` when the list was made

    @property
    def nbytes(self) -> int:
        return self.used.nbytes + self.keys.nbytes

    def wipe(self) -> None:
        wipe(self.keys)
        wipe(self.used)

    def keys_of(self, batch: KeyBatch, rows: torch.Tensor, new: torch.Tensor) -> None:
        rows = rows[new]
        size = self.store.pool.rows
        if self.used.shape[0] < size:
            before = self.used.shape[0]
            self.used = grown(self.used, size)
            self.used[before:] = -1
            if batch.ints is not None:
                self.keys = grown(self.keys, size)
        if batch.ints is not None:
            self.keys[rows] = batch.ints.to(self.store.device)[new]
        self.used[rows] = 0

    def touch(self, rows: torch.Tensor) -> None:
        if self.policy == "lfu":
            self.used.index_add_(0, rows, torch.ones_like(rows))
        else:
            times = torch.arange(self.clock + 1, self.clock + 1 + rows.shape[0], device=rows.device)
            self.used.scatter_reduce_(0, rows, times, "amax")
            self.clock += rows.shape[0]

    def forget(self, rows: torch.Tensor) -> None:
        rows = rows.to(self.store.device)
        self.used[rows] = -1
        if self.keys.shape[0]:
            self.keys[rows] = 0

    def make_room(self, batch: KeyBatch, capacity: int) -> Evicted | None:
        """Takes out as many keys as the new ones of this batch need; none of the batch's own."""
        store = self.store
        rows = store.index.entries(batch)
        surplus = len(store) + len(batch) - capacity
        if surplus > 0:
            surplus = len(store) + distinct_absent(batch, rows < 0) - capacity
        if surplus <= 0:
            return None
        victims = self._first(surplus, rows[rows >= 0].to(store.device))
        if store.index.texts is not None:
            keys = store.index.texts.batch(store.key_type, victims.to("cpu"))
        else:
            keys = KeyBatch("int64", self.keys[victims])
        values = {name: store.pool.read(name, victims, store._zero(name)) for name in store.columns}
        store.erase(keys)
        return Evicted(keys, values)

    def _first(self, count: int, spared: torch.Tensor) -> torch.Tensor:
        """The rows that go first, none of `spared`."""
        end = self.store.pool.numbers.end
        if self.policy == "lru" and self.order is not None:
            found = self._from_list(count, spared)
            if found is not None:
                return found
        used = self.used[:end].clone()
        used[spared] = -1
        taken = (used >= 0).nonzero()[:, 0]
        order = taken[torch.argsort(used[taken], stable=True)]
        if self.policy == "lru":
            self.order, self.seen = order[count:], self.used.clone()
        return order[:count]

    def _from_list(self, count: int, spared: torch.Tensor) -> torch.Tensor | None:
        assert self.order is not None
        look = 2 * count + spared.shape[0] + 64
        while True:
            ahead = self.order[:look]
            good = self.used[ahead] == self.seen[ahead]
            good &= ~torch.isin(ahead, spared)
            places = good.nonzero()[:, 0]
            if places.shape[0] >= count:
                self.order = self.order[int(places[count - 1]) + 1 :] if count else self.order
                return ahead[places[:count]]
            if look >= self.order.shape[0]:
                return None
            look *= 4
