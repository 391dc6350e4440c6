"""Which keys were used when, or how often: who has to go when a bounded store is full."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from memkernels.store.buffers import grown, wipe
from memkernels.store.keys import KeyBatch, distinct, join

if TYPE_CHECKING:
    from memkernels.store.inmemory import InMemory

Values = dict[str, torch.Tensor]
POLICIES = ("lru", "lfu")


class Evicted(NamedTuple):
    """Keys that made room for others, with the values they had, as `KeyValueStore.items` gives them."""

    keys: Any
    values: Any


class Lost(NamedTuple):
    """What `Evicted` is made of."""

    keys: KeyBatch
    values: Values


Outcome = tuple[torch.Tensor, Lost | None]  # what was done with each element, and who had to go


def in_slices(batch: KeyBatch, values: Values, capacity: int, put: Callable[[KeyBatch, Values], Outcome]) -> Outcome:
    """Puts a batch of more keys than the capacity in slices of it: such a one always fits, and evicts none of its own keys."""
    if len(batch) <= capacity or int(distinct(batch).sum()) <= capacity:
        return put(batch, values)
    states, lost = [], []
    for begin in range(0, len(batch), capacity):
        some = torch.arange(begin, min(begin + capacity, len(batch)))
        status, gone = put(batch.select(some), {name: value[begin : begin + capacity] for name, value in values.items()})
        states.append(status)
        if gone is not None:
            lost.append(gone)
    if not lost:
        return torch.cat(states), None
    return torch.cat(states), Lost(join([e.keys for e in lost]), {name: torch.cat([e.values[name] for e in lost]) for name in values})


def distinct_absent(batch: KeyBatch, absent: torch.Tensor) -> int:
    """How many different keys of a batch are absent."""
    missing = batch.select(absent)
    return int(torch.unique(missing.ints).shape[0]) if missing.ints is not None else len(set(missing.tolist()))


class Held(NamedTuple):
    """Distinct keys as they were: when or how often they were used (-1: not there), and their values."""

    keys: KeyBatch
    times: torch.Tensor
    values: Values


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
            if batch.ints is not None:
                self.keys = grown(self.keys, size)
            self.used = grown(self.used, size)
            self.used[before:] = -1
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
        rows = rows[rows < self.used.shape[0]]  # all, unless there was no memory for them
        self.used[rows] = -1
        if self.keys.shape[0]:
            self.keys[rows] = 0

    def victims(self, batch: KeyBatch, capacity: int) -> torch.Tensor:
        """Rows of as many keys as the new ones of this batch need the room of; none of the batch's own."""
        store = self.store
        rows = store.index.entries(batch)
        surplus = len(store) + len(batch) - capacity
        if surplus > 0:
            surplus = len(store) + distinct_absent(batch, rows < 0) - capacity
        if surplus <= 0:
            return torch.empty(0, dtype=torch.int64, device=store.device)
        return self._first(surplus, rows[rows >= 0].to(store.device))

    def keys_at(self, rows: torch.Tensor) -> KeyBatch:
        if self.store.index.texts is not None:
            return self.store.index.texts.batch(self.store.key_type, rows.to("cpu"))
        return KeyBatch("int64", self.keys[rows])

    def in_order(self, spared: torch.Tensor | None = None) -> torch.Tensor:
        """The rows in use but those of `spared`, the first to go first."""
        used = self.used[: self.store.pool.numbers.end].clone()
        if spared is not None:
            used[spared] = -1
        taken = (used >= 0).nonzero()[:, 0]
        return taken[torch.argsort(used[taken], stable=True)]

    def _first(self, count: int, spared: torch.Tensor) -> torch.Tensor:
        """The rows that go first, none of `spared`."""
        if self.policy == "lru" and self.order is not None:
            found = self._from_list(count, spared)
            if found is not None:
                return found
        order = self.in_order(spared)
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
