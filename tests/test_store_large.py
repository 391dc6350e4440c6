"""Batches of the sizes that threads share, and of several slices, against arrays that a loop over the batch would leave."""

import random

import pytest
import torch
from store_logs import plain

import memkernels as mk

pytestmark = pytest.mark.usefixtures("three_threads")
SIZES = (1, 50, 3000, 40_000, 150_000)  # the index takes 65,536 elements at a time


class Model:
    """What a store of `count` keys holds: values, and which keys are there."""

    def __init__(self, key_type, count):
        self.ints = torch.randint(-(2**63), 2**63 - 1, (count,))
        self.names = None if key_type == "int64" else [f"{i} of them" if i % 3 else f"{i}" for i in range(count)]
        if key_type == "bytes":
            self.names = [name.encode() for name in self.names]
        self.values, self.there = torch.zeros(count, 2, dtype=torch.float64), torch.zeros(count, dtype=torch.bool)

    def keys(self, index):
        return self.ints[index] if self.names is None else [self.names[i] for i in index.tolist()]

    def numbers(self, keys):
        """Which keys a batch of evicted ones holds."""
        known = {key: i for i, key in enumerate(self.ints.tolist() if self.names is None else self.names)}
        return torch.tensor([known[key] for key in plain(keys)], dtype=torch.int64)

    def first(self, index):
        """Whether an element is the first of its key in the batch."""
        places = torch.arange(index.shape[0])
        return torch.full((self.there.shape[0],), -1).scatter_reduce(0, index, places, "amin", include_self=False)[index] == places

    def put(self, index, values, how):
        """Status of each element."""
        new = self.first(index) & ~self.there[index]
        if how == "accumulate":
            self.values[~self.there] = 0
            self.values.index_add_(0, index, values)
        else:
            places = torch.arange(index.shape[0])
            which = torch.full((self.there.shape[0],), -1)
            which.scatter_reduce_(0, index, places, "amin" if how == "if_absent" else "amax", include_self=False)
            written = torch.unique(index[~self.there[index]] if how == "if_absent" else index)
            self.values[written] = values[which[written]]
        self.there[index] = True
        return torch.where(new, 0, {"replace": 1, "if_absent": 2, "accumulate": 3}[how]).to(torch.int8)

    def erase(self, index):
        gone = self.there[index] & self.first(index)
        self.there[index] = False
        return gone


def program(store, model, source, steps, capacity):
    for _ in range(steps):
        index = torch.randint(0, model.there.shape[0], (source.choice(SIZES),))
        if capacity is not None:  # more keys than fit go in slices of their own, which is another test
            index = index[torch.isin(index, torch.unique(index)[:capacity])]
        if source.random() < 0.7:
            how, values = (
                source.choice(["replace", "replace", "if_absent", "accumulate"]),
                torch.randn(index.shape[0], 2).mul(8).round().double(),
            )
            there, before = model.there.clone(), model.values.clone()
            status, gone = store.store(model.keys(index), values, **({} if how == "replace" else {how: True}), return_evicted=True)
            assert torch.equal(status, model.put(index, values, how))
            if gone is not None:
                evicted = model.numbers(gone.keys)
                assert capacity and there[evicted].all() and not torch.isin(evicted, index).any()
                assert torch.equal(gone.values, before[evicted])
                model.there[evicted] = False
        else:
            assert torch.equal(store.erase(model.keys(index)).bool(), model.erase(index))
        assert len(store) == int(model.there.sum()) <= (capacity or len(store))
        values, found = store.retrieve(model.keys(index))
        assert torch.equal(found, model.there[index]) and torch.equal(values[found], model.values[index][found])
    values, found = store.retrieve(model.keys(torch.arange(model.there.shape[0])))
    assert torch.equal(found, model.there) and torch.equal(values[found], model.values[found]) and not values[~found].any()


@pytest.mark.parametrize("on_full", ["grow", "lru", "lfu"])
@pytest.mark.parametrize("key_type", ["int64", "str", "bytes"])
def test_large_batches(key_type, on_full, seeds=2):
    for seed in range(seeds):
        source = random.Random(f"{key_type} {on_full} {seed}")
        torch.manual_seed(source.randrange(2**31))
        count = source.choice([3000, 30_000, 90_000])
        capacity = None if on_full == "grow" else count * source.choice([3, 6, 9]) // 10
        store = mk.KeyValueStore(2, torch.float64, key_type=key_type, capacity=capacity, on_full=on_full)
        program(store, Model(key_type, count), source, 12, capacity)


@pytest.mark.slow
@pytest.mark.parametrize("on_full", ["grow", "lru", "lfu"])
@pytest.mark.parametrize("key_type", ["int64", "str", "bytes"])
def test_large_batches_long(key_type, on_full):
    test_large_batches(key_type, on_full, seeds=40)


@pytest.mark.parametrize("key_type", ["str", "bytes"])
def test_equal_byte_keys_of_different_slices_are_one(key_type):
    """The bytes of a new key are in the batch alone until all of it is stored."""
    store = mk.KeyValueStore((), torch.int64, key_type=key_type)
    names = [f"key {i % 66_000}" if key_type == "str" else b"key %d" % (i % 66_000) for i in range(70_000)]
    status = store.store(names, torch.arange(70_000))
    assert len(store) == 66_000 and status.tolist() == [0] * 66_000 + [1] * 4000
    assert store.retrieve(names)[0][:5000].tolist() == [*range(66_000, 70_000), *range(4000, 5000)]
    assert store.erase(names).sum() == 66_000 and not store.contains(names).any()
