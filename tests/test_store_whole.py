"""Calls that are refused or fail: nothing of them is there afterwards, neither in memory nor in the next commit."""

import pytest
import torch
from store_logs import plain

import memkernels as mk
from memkernels.store.errors import StoreError
from memkernels.store.pool import Pool
from memkernels.store.segments import Segments

EMPTY = torch.empty(0, dtype=torch.int64)
ONES = torch.ones(1, dtype=torch.int64)
WRITES = {
    "store": lambda s: s.store([], EMPTY),
    "if_absent": lambda s: s.store([], EMPTY, if_absent=True),
    "accumulate": lambda s: s.store([], EMPTY, accumulate=True),
    "there": lambda s: s.store([1], ONES, if_absent=True),
    "erase": lambda s: s.erase([]),
    "erase absent": lambda s: s.erase([99]),
    "load": lambda s: s.load_state_dict({"keys": EMPTY, "column.value": EMPTY}),
    "commit": lambda s: s.commit(),
    "rollback": lambda s: s.rollback(),
    "compact": lambda s: s.compact(),
}


def made(path, capacity=4, policy="lru", **options):
    return mk.KeyValueStore((), torch.int64, path=path, capacity=capacity, on_full=policy, **options)


def held(store):
    """What is there, without using it."""
    return {key: value for keys, values in store.items() for key, value in zip(plain(keys), values.tolist(), strict=True)}


@pytest.mark.parametrize("write", WRITES)
def test_a_reader_refuses_every_write_also_one_that_would_change_nothing(tmp_path, write):
    with made(tmp_path / "s") as store:
        store.store([1], ONES)
        store.commit()
    with mk.KeyValueStore.open(tmp_path / "s") as reader:
        with pytest.raises(StoreError, match="is open for reading only"):
            WRITES[write](reader)
        assert held(reader) == {1: 1} and not reader.refresh()


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_closed_store_refuses_every_write(tmp_path, write, on_disk):
    store = made(tmp_path / "s" if on_disk else None)
    store.close()
    with pytest.raises(ValueError, match="expected an open store, got a closed one"):
        WRITES[write](store)


def failing_at(monkeypatch, owner, name, call):
    """The method raises at this call of it, and then no more."""
    method, calls = getattr(owner, name), []

    def either(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        return method(*arguments)

    monkeypatch.setattr(owner, name, either)


OTHERS = [[*range(10, 25)], [1, 11, 2, 12, 3, 1, 13, 4, 14, 4, 4, 10, 11, 2]]


@pytest.mark.parametrize("key_type", ["int64", "str"])
@pytest.mark.parametrize("how", ["replace", "if_absent", "accumulate"])
@pytest.mark.parametrize("numbers", OTHERS)
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_batch_beyond_the_capacity_is_stored_whole_or_not_at_all(tmp_path, monkeypatch, call, numbers, how, key_type):
    name = (lambda n: n) if key_type == "int64" else (lambda n: f"key {n}")
    options = {} if how == "replace" else {how: True}
    everyone = {name(n): n for n in (1, 2, 3, 4)}
    with made(tmp_path / "s", key_type=key_type) as store, mk.KeyValueStore.open(tmp_path / "s") as reader:
        store.store([name(n) for n in (1, 2, 3, 4)], torch.arange(1, 5))
        store.commit()
        store.get(name(1))
        store.store([name(3)], torch.tensor([3]))  # not committed, and to stay
        with monkeypatch.context() as patch:
            failing_at(patch, Segments, "write", call)
            with pytest.raises(OSError, match="No space left"):
                store.store([name(n) for n in numbers], torch.tensor(numbers), **options)
        assert held(store) == everyone
        store.commit()
        assert reader.refresh() and held(reader) == everyone and reader.verify().ok
        gone = [plain(store.store([name(n)], torch.tensor([n]), return_evicted=True)[1].keys) for n in (30, 31, 32, 33)]
        assert gone == [[name(2)], [name(4)], [name(1)], [name(3)]]  # the order of use is as it was
        store.rollback()
        assert held(store) == everyone
    with mk.KeyValueStore.open(tmp_path / "s", "w") as store:
        assert held(store) == everyone


@pytest.mark.parametrize("key_type", ["int64", "bytes"])
@pytest.mark.parametrize("how", ["replace", "if_absent", "accumulate"])
@pytest.mark.parametrize("numbers", [[5], [4, 5, 1], *OTHERS])
@pytest.mark.parametrize("call", [1, 2, 3, 4, 5, 6])
def test_the_same_in_memory(monkeypatch, call, numbers, how, key_type):
    name = (lambda n: n) if key_type == "int64" else (lambda n: b"key %d" % n)
    options = {} if how == "replace" else {how: True}
    columns = {"a": ((), torch.int64), "b": ((2,), torch.float32)}
    store = mk.KeyValueStore(columns=columns, key_type=key_type, capacity=4, on_full="lru")

    def values(these):
        return {"a": torch.tensor(these), "b": torch.tensor([[n, -n] for n in these], dtype=torch.float32)}

    def put(these, **options):
        return store.store([name(n) for n in these], values(these), **options)

    put([1, 2, 3, 4])
    store.get(name(1))
    with monkeypatch.context() as patch:
        failing_at(patch, Pool, "read" if how == "accumulate" else "reserve", call)
        try:
            put(numbers, **options)
        except OSError:
            pass
        else:
            return  # it had fewer of these calls
    assert len(store) == 4
    gone = [put([n], return_evicted=True)[1] for n in (30, 31, 32, 33)]  # the order of use is as it was
    assert [plain(one.keys) for one in gone] == [[name(2)], [name(3)], [name(4)], [name(1)]]
    assert [(one.values["a"].tolist(), one.values["b"].tolist()) for one in gone] == [([n], [[n, -n]]) for n in (2, 3, 4, 1)]


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_state_that_does_not_fit_leaves_what_was_there(tmp_path, on_disk):
    store = made(tmp_path / "s" if on_disk else None, policy="error")
    store.store([1, 2], torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="at most 4 keys"):
        store.load_state_dict({"keys": torch.arange(10), "column.value": torch.arange(10)})
    assert held(store) == {1: 1, 2: 2}
    store.load_state_dict({"keys": torch.arange(3, 6), "column.value": torch.arange(3)})
    assert held(store) == {3: 0, 4: 1, 5: 2}
    store.close()


def test_a_state_that_the_disk_refuses_leaves_what_was_there(tmp_path, monkeypatch):
    with made(tmp_path / "s") as store:
        store.store([1, 2], torch.tensor([1, 2]))
        store.commit()
        with monkeypatch.context() as patch:
            failing_at(patch, Segments, "write", 1)
            with pytest.raises(OSError, match="No space left"):
                store.load_state_dict({"keys": torch.arange(3, 6), "column.value": torch.arange(3)})
        store.commit()
        assert held(store) == {1: 1, 2: 2}
    with mk.KeyValueStore.open(tmp_path / "s") as reader:
        assert held(reader) == {1: 1, 2: 2}


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("key_type", ["int64", "str", "bytes"])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_no_memory_for_the_index_changes_nothing(monkeypatch, tmp_path, call, key_type, disk):
    """Of the allocations of a table and of the bytes of keys, the given one fails."""
    from memkernels.store import index

    calls = 0

    def failing(make):
        def wrapped(*args):
            nonlocal calls
            calls += 1
            if calls == call:
                raise MemoryError("no more")
            return make(*args)

        return wrapped

    name = {"int64": lambda n: n, "str": lambda n: f"key {n}", "bytes": lambda n: b"key %d" % n}[key_type]
    names, numbers = [name(n) for n in range(400)], torch.arange(400)
    store = mk.KeyValueStore((), torch.int64, key_type=key_type, path=tmp_path / "s" if disk else None)
    store.store(names[:10], numbers[:10])
    with monkeypatch.context() as patch:
        for function in ("fresh", "grown"):
            patch.setattr(index, function, failing(getattr(index, function)))
        try:
            store.store(names[5:], numbers[5:])
        except MemoryError:
            assert len(store) == 10 and not store.contains(names[10:]).any()
        else:
            assert calls < call  # it had fewer of them
    assert store.retrieve(names[:10])[0].tolist() == list(range(10))
    store.store(names, numbers)
    assert len(store) == 400 == sum(len(keys) for keys, _ in store.items())
    assert torch.equal(store.retrieve(names)[0], numbers)
    assert store.erase(names).all() and len(store) == 0 == sum(len(keys) for keys, _ in store.items())
    store.close()
