"""A bounded store on disk: who goes, and what commits, rollbacks, openings and errors leave of that."""

import pytest
import torch
from store_logs import plain

import memkernels as mk
from memkernels.store.errors import StoreFormatError
from memkernels.store.logged import create
from memkernels.store.segments import Segments


def made(path, policy="lru", key_type="int64", capacity=4):
    return mk.KeyValueStore((), torch.int64, path=path, capacity=capacity, on_full=policy, key_type=key_type)


def named(key_type, *keys):
    return [*keys] if key_type == "int64" else [f"k{k}" for k in keys]


def keys_of(store):
    return sorted(key for keys, _ in store.items() for key in plain(keys))


def held(store):
    """What is there, without using it."""
    return {key: value for keys, values in store.items() for key, value in zip(keys.tolist(), values.tolist(), strict=True)}


@pytest.mark.parametrize("key_type", ["int64", "str"])
def test_what_goes_is_erased_in_the_same_commit(tmp_path, key_type):
    with made(tmp_path / "s", key_type=key_type) as store, mk.KeyValueStore.open(store.path) as reader:
        store.store(named(key_type, 1, 2, 3, 4), torch.arange(1, 5))
        store.commit()
        assert reader.refresh() and keys_of(reader) == named(key_type, 1, 2, 3, 4)
        store.get(named(key_type, 1)[0])
        _, gone = store.store(named(key_type, 5, 6), torch.tensor([5, 6]), return_evicted=True)
        assert plain(gone.keys) == named(key_type, 2, 3) and gone.values.tolist() == [2, 3]
        assert keys_of(reader) == named(key_type, 1, 2, 3, 4)
        store.commit()
        assert reader.refresh() and keys_of(reader) == keys_of(store) == named(key_type, 1, 4, 5, 6)


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_rollback_brings_back_who_went_and_when_they_were_used(tmp_path, policy):
    with made(tmp_path / "s", policy) as store:
        store.store([1, 2, 3, 4], torch.arange(1, 5))
        for key in (3, 1, 2):
            store.get(key)
        store.commit()
        store.store([4, 5, 6, 5], torch.arange(4), accumulate=True)
        store.erase([2])
        store.rollback()
        assert held(store) == {1: 1, 2: 2, 3: 3, 4: 4}
        gone = [store.store([k], torch.tensor([k]), return_evicted=True)[1].keys.tolist() for k in (7, 8)]
        assert gone == [[4], [3 if policy == "lru" else 7]]


def test_a_store_opened_again_begins_with_the_order_of_writing(tmp_path):
    with made(tmp_path / "s") as store:
        store.store([4, 3, 2, 1], torch.arange(4))
        store.store([3], torch.tensor([30]))
        store.commit()
    with mk.KeyValueStore.open(tmp_path / "s", mode="w") as store:
        assert store.store([9, 8], torch.arange(2), return_evicted=True)[1].keys.tolist() == [4, 2]
        store.get(1)
        store.compact(erase=True)  # written in the order of use
    with mk.KeyValueStore.open(tmp_path / "s", mode="w") as store:
        assert store.store([5, 6], torch.arange(2), return_evicted=True)[1].keys.tolist() == [3, 9]
        assert store.verify().ok


def test_opened_with_less_room_it_shrinks_at_the_next_store(tmp_path):
    with made(tmp_path / "s", capacity=10) as store:
        store.store(range(10), torch.arange(10))
        store.commit()
    with made(tmp_path / "s", capacity=3) as store:
        assert len(store) == 10
        assert store.store([20], torch.tensor([20]), return_evicted=True)[1].keys.tolist() == list(range(8))
        assert keys_of(store) == [8, 9, 20]


def test_nobody_goes_when_the_disk_refuses(tmp_path, monkeypatch):
    with made(tmp_path / "s") as store:
        store.store([1, 2, 3, 4], torch.arange(1, 5))

        def refuse(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Segments, "write", refuse)
            with pytest.raises(OSError, match="No space left"):
                store.store([5, 6], torch.tensor([5, 6]))
        assert held(store) == {1: 1, 2: 2, 3: 3, 4: 4}
        assert store.store([5], torch.tensor([5]), return_evicted=True)[1].keys.tolist() == [1]


def test_limits_that_cannot_be_are_a_damage(tmp_path):
    columns = {"value": ((), torch.int64)}
    for i, (capacity, on_full) in enumerate([("7", "lru"), (-1, "lfu"), (4, "never")]):
        create(tmp_path / str(i), "int64", columns, {"capacity": capacity, "on_full": on_full}, "none").close()
        with pytest.raises(StoreFormatError, match="is damaged: capacity"):
            mk.KeyValueStore.open(tmp_path / str(i), mode="w")


def test_a_batch_that_a_parameter_cannot_hold_leaves_everybody():
    store = mk.KeyValueStore(2, capacity=8, on_full="lru")
    store.store([1, 2, 3], torch.ones(3, 2))
    store.as_parameter()
    with pytest.raises(ValueError, match="at most 3 rows"):
        store.store(range(10, 18), torch.ones(8, 2))
    assert keys_of(store) == [1, 2, 3]


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("disk", [False, True])
def test_a_batch_of_few_keys_often_evicts_none_of_its_own(tmp_path, policy, disk):
    with made(tmp_path / "s" if disk else None, policy, capacity=3) as store:
        store.store([1, 2, 3], torch.tensor([10, 20, 30]))
        keys = [9, 9, 9, 1]  # longer than the capacity, its keys are not
        status, gone = store.store(keys, torch.ones(4, dtype=torch.int64), accumulate=True, return_evicted=True)
        assert status.tolist() == [0, 3, 3, 3] and gone.keys.tolist() == [2]
        assert held(store) == {1: 11, 3: 30, 9: 3}
