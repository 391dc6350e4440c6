"""Who has to go when a bounded store on disk is full."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from memkernels.store.inmemory import InMemory
from memkernels.store.keys import KeyBatch
from memkernels.store.use import Use


class KeyUse:
    """When or how often each key was used: a store in memory of the same keys, without values.

    Args:
        key_type: of the keys. capacity: the most keys. policy: "lru" or "lfu".
    """

    def __init__(self, key_type: str, capacity: int, policy: str):
        self.capacity = capacity
        self.keys = InMemory(key_type, {}, torch.device("cpu"), None, policy)

    @property
    def use(self) -> Use:
        assert self.keys.use is not None
        return self.keys.use

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes

    def victims(self, batch: KeyBatch) -> KeyBatch:
        """The keys that must go before this batch comes. Nothing is changed but the list that is gone through: see `forget_list`."""
        return self.use.keys_at(self.use.victims(batch, self.capacity))

    def forget_list(self) -> None:
        """Those named by `victims` did not go."""
        self.use.order = None

    def put(self, batch: KeyBatch) -> None:
        self.keys._put(batch, {}, False, False)

    def erase(self, batch: KeyBatch) -> None:
        self.keys.erase(batch)

    def touch(self, batch: KeyBatch) -> None:
        self.keys.rows(batch, True)

    def times(self, batch: KeyBatch) -> torch.Tensor:
        """What `restore` takes; -1 for a key that is not there."""
        rows = self.keys.index.find(batch)
        return torch.where(rows < 0, -1, self.use.used[rows.clamp(min=0)]) if self.use.used.shape[0] else rows

    def restore(self, batch: KeyBatch, times: torch.Tensor) -> None:
        """Distinct keys, as they were when `times` was asked for."""
        was = times >= 0
        self.erase(batch.select(~was))
        back = batch.select(was)
        self.put(back)
        self.use.used[self.keys.index.find(back)] = times[was]
        self.forget_list()

    def batches(self, step: int = 1 << 14) -> Iterator[KeyBatch]:
        """All keys, the first to go first."""
        for rows in self.use.in_order().split(step):
            yield self.use.keys_at(rows)

    def compact(self, erase: bool) -> None:
        self.keys.compact(erase)

    def clear(self) -> None:
        self.keys.clear()
