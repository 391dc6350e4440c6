"""What the processes of tests/test_sharded_store.py run of ShardedStore: random calls against a dict, errors, other numbers of ranks."""

import os
import random
import time

import pytest
import torch
import torch.distributed as dist

from memkernels.distributed import ShardedStore, _shards
from memkernels.distributed._routing import owners
from memkernels.store import KeyValueStore
from memkernels.store.errors import StoreError, StoreFormatError
from memkernels.store.keys import as_batch

FAR = [-(2**63), -1, 0, 1, 2**63 - 1]
COLUMNS = {"value": ((2,), torch.bfloat16), "flag": ((), torch.bool), "nothing": ((0,), torch.int64), "count": ((), torch.int64)}


def key_of(key_type, number):
    text = f"{number}" + "x" * (number % 9)
    return {"int64": FAR[number] if number < 5 else number * 2**40, "str": "é" + text if number else "", "bytes": b"\xff" + text.encode()}[
        key_type
    ]


def values_of(numbers):
    return {
        "value": torch.tensor([[n, -n] for n in numbers], dtype=torch.bfloat16).view(-1, 2),
        "flag": torch.tensor([n % 2 == 1 for n in numbers], dtype=torch.bool),
        "nothing": torch.empty(len(numbers), 0, dtype=torch.int64),
        "count": torch.tensor(numbers, dtype=torch.int64),
    }


def keys_of(key_type, keys):
    return torch.tensor(keys, dtype=torch.int64) if key_type == "int64" and keys else keys


def drawn(call, size):
    """What every rank passes to a call: up to 8 keys each, of 20, and a value each; the same on all ranks."""
    rng = random.Random(call)
    counts = [rng.choice([0, 1, 8]) for _ in range(size)]
    return [[(rng.randrange(20), rng.randrange(100)) for _ in range(n)] for n in counts], rng


def apply(held, mine, how):
    """The dict after all ranks' batches, one after the other."""
    for batch in mine:
        for key, value in batch:
            if how == "if_absent":
                held.setdefault(key, value)
            else:
                held[key] = value


def check_against_a_dict(rank, size):
    for key_type in ("int64", "str", "bytes")[: 5 - size]:
        held: dict[int, int] = {}
        with ShardedStore(columns=COLUMNS, key_type=key_type) as store:
            for call in range(6):
                batches, rng = drawn(call, size)
                keys = keys_of(key_type, [key_of(key_type, k) for k, _ in batches[rank]])
                how = rng.choice(["plain", "plain", "if_absent", "erase"])
                if how == "erase":
                    there = [k in held and k not in [j for b in batches[:rank] for j, _ in b] for k, _ in batches[rank]]
                    first = [k not in [j for j, _ in batches[rank][:i]] for i, (k, _) in enumerate(batches[rank])]
                    assert store.erase(keys).tolist() == [a and b for a, b in zip(there, first)]
                    for batch in batches:
                        for key, _ in batch:
                            held.pop(key, None)
                else:
                    new = [k not in held for k, _ in batches[rank]]
                    status = store.store(keys, values_of([v for _, v in batches[rank]]), if_absent=how == "if_absent")
                    assert status.dtype == torch.int8 and all(s != 0 or n for s, n in zip(status.tolist(), new))
                    apply(held, batches, how)
                assert len(store) == len(held)
                compare(store, key_type, held, rank)
            own = sum(len(part) for part, _ in store.items())
            assert own == len(store.local)
            spread = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
            dist.all_gather(spread, torch.tensor([own]))
            assert sum(int(n) for n in spread) == len(held)


def compare(store, key_type, held, rank):
    asked = [(7 * i + rank) % 20 for i in range(5 + rank)]  # every rank asks for other keys
    keys = keys_of(key_type, [key_of(key_type, k) for k in asked])
    values, found = store.retrieve(keys)
    assert found.tolist() == [k in held for k in asked] and torch.equal(store.contains(keys), found)
    want = values_of([held.get(k, 0) for k in asked])
    assert all(torch.equal(values[name], want[name]) for name in COLUMNS)
    some, _ = store.retrieve(keys, columns=["count"], default=rank)
    assert list(some) == ["count"] and some["count"].tolist() == [held.get(k, rank) for k in asked]


def check_one_column(rank, size):
    """The last rank wins, sums are of all ranks, the keys are spread evenly, and the place of a key never changes."""
    store = ShardedStore(3, dtype=torch.float64)
    store.store([5, 6], torch.full((2, 3), float(rank), dtype=torch.float64))
    assert store.retrieve([5])[0].tolist() == [[size - 1.0] * 3] and store.retrieve([5], columns=[])[0] == {}
    store.store([6], torch.ones(1, 3, dtype=torch.float64), accumulate=True)
    assert store.retrieve([6])[0].tolist() == [[2.0 * size - 1] * 3]
    many = as_batch("test", "int64", torch.arange(40_000))
    counts = torch.bincount(owners(many, size), minlength=size)
    assert counts.sum() == 40_000 and (counts - 40_000 / size).abs().max() < 600
    assert (
        owners(as_batch("test", "int64", FAR), 4).tolist() == PLACES[0]
        and owners(as_batch("test", "str", ["", "apple", "é"]), 4).tolist() == PLACES[1]
    )


PLACES = ([2, 0, 0, 1, 2], [0, 0, 1])  # of the format on disk: may not change


def check_errors(rank, size):
    """Every rank raises, whichever of them is wrong, and the store can be used afterwards."""
    store, last = ShardedStore(2), rank == size - 1
    other = (RuntimeError, "expected arguments like here, got some that it refused")
    with _raises(*(TypeError, "ShardedStore: keys.0.: expected an int, got str") if last else other):
        store.retrieve(["a"] if last else [1])
    with _raises(*(ValueError, "ShardedStore: values: expected shape") if last else other):
        store.store([1], torch.zeros(1, 3 if last else 2))
    with _raises(*(TypeError, "ShardedStore: columns: expected names of columns, or None, got int") if last else other):
        store.retrieve([1], columns=5 if last else None)
    with pytest.raises(ValueError, match="ShardedStore: keys: expected the same if_absent on all ranks"):
        store.store([1], torch.zeros(1, 2), if_absent=last)
    with pytest.raises(ValueError, match="ShardedStore: keys: expected the same call on all ranks"):
        store.erase([1]) if last else store.contains([1])
    with pytest.raises(ValueError, match="ShardedStore: columns: expected the same keys and columns on all ranks"):
        ShardedStore(3 if last else 2)
    if last:
        store.local.close()
    with _raises(*(ValueError, "closed") if last else (RuntimeError, f"rank {size - 1}: expected what succeeds here")):
        store.contains([1])
    with _raises(*(ValueError, "closed") if last else other):
        len(store)
    for wrong, error, text in (
        (dict(device="nowhere"), RuntimeError, "Expected one of cpu"),
        (dict(device="meta"), ValueError, "ShardedStore: device: expected a device that holds data, got meta"),
        (dict(path=5), TypeError, "ShardedStore: path: expected a path, got int"),
        (dict(durability="twice"), ValueError, "durability"),
    ):
        with _raises(*(error, text) if last else (RuntimeError, f"ShardedStore: rank {size - 1}: expected ")):
            ShardedStore(2, **(wrong if last else {}))
    with _raises(*(TypeError, "path: expected a path, got NoneType") if last else other):
        ShardedStore.open(None if last else "nothing")
    with _raises(*(ValueError, "mode: expected one of 'r', 'w', got 'x'") if last else other):
        ShardedStore.open("nothing", mode="x" if last else "r")
    with pytest.raises(ValueError, match="ShardedStore: mode: expected the same mode on all ranks"):
        ShardedStore.open("nothing", mode="r" if last else "w")
    fresh = ShardedStore(2)
    fresh.store([rank], torch.zeros(1, 2))
    assert len(fresh) == size


def _raises(error, text):
    return pytest.raises(error, match=text)


def check_other_numbers_of_ranks(path, rank, size):
    """Written by 3 ranks, opened by 2, 1 and 4; whoever stored a key, all find it. What was not committed is not there."""
    held: dict[int, int] = {}
    for turn, ranks in enumerate((3, 2, 1, size)):
        group = dist.new_group(range(ranks))
        key_type = "str"
        if rank < ranks:
            store = ShardedStore.open(path, group=group) if turn else ShardedStore(columns=COLUMNS, key_type="str", path=path, group=group)
            assert len(store) == len(held) and store.columns == COLUMNS
            compare(store, key_type, held, rank)
            mine = [(k, 100 * turn + k) for k in range(turn, 20, 3)][rank::ranks]
            store.store(keys_of(key_type, [key_of(key_type, k) for k, _ in mine]), values_of([v for _, v in mine]))
            store.commit()
            store.erase(keys_of(key_type, [key_of(key_type, 3)]))  # not committed
            store.close()
        held.update({k: 100 * turn + k for k in range(turn, 20, 3)})
        dist.barrier()
        generations = sorted(p.name for p in path.iterdir())
        assert generations == ["CURRENT", f"generation-{turn + 1:06d}"]
        dist.barrier()  # the next turn makes another generation, whoever still looks
    with ShardedStore.open(path, mode="r") as store:
        compare(store, "str", held, rank)


def check_damage(path, rank, size):
    """A crash before a new generation was complete leaves the old one; a missing shard, a newer version and another file are refused."""
    pair, alone = dist.new_group([0, 1]), dist.new_group([0])
    if rank < 2:
        with ShardedStore(2, path=path, group=pair) as store:
            store.store(torch.arange(9), torch.ones(9, 2))
            store.commit()
    dist.barrier()
    if rank == 0:
        (path / "generation-000002" / "rank-00000-of-00001").mkdir(parents=True)  # what a crash left
        with _raises(ValueError, "mode: expected 'w' to spread the keys of 2 ranks over 1, got 'r'"):
            ShardedStore.open(path, mode="r", group=alone)
        line = (path / "CURRENT").read_text()
        for text, error in (
            ("memkernels.ShardedStore 2 1 2\n", "newer than this memkernels"),
            ("x" * 500, "expected the line of a sharded"),
        ):
            (path / "CURRENT").write_text(text)
            with _raises(StoreFormatError, error):
                ShardedStore.open(path, group=alone)
        (path / "CURRENT").write_text(line)
        shard = path / "generation-000001" / "rank-00001-of-00002"
        shard.rename(path / "elsewhere")
        with _raises(StoreError, "no rank sees .*rank-00001-of-00002, of the 2 shards"):
            ShardedStore.open(path, group=alone)
        (path / "elsewhere").rename(shard)
        with ShardedStore.open(path, group=alone) as store:
            assert len(store) == 9
        with _raises(StoreError, "there is no sharded store at"):
            ShardedStore.open(path / "nothing", group=alone)
        with _raises(StoreError, "there is a store at"):
            ShardedStore(2, path=path, group=alone)
    dist.barrier()


def check_failures(path, rank, size):
    """What fails on one rank raises on all, leaves nothing open, and can be tried again."""
    last, kept = rank == size - 1, []

    def refused(error, text, call):
        try:
            call()
        except error as raised:
            assert text in str(raised), str(raised)
            kept.append(raised)  # with its frames, as a program that logs it later would
        else:
            raise AssertionError(f"not refused: {text}")

    refused(ValueError, "the same keys and columns", lambda: ShardedStore(3 if last else 2, path=path))
    with ShardedStore(2, path=path) as store:  # the folders of the failed call are gone
        store.store(torch.arange(500) + 500 * rank, torch.ones(500, 2))
        store.commit()
    shard = path / "generation-000001" / f"rank-{size - 1:05d}-of-{size:05d}"
    dist.barrier()
    if last:
        shard.rename(path / "elsewhere")
    dist.barrier()
    refused(*(StoreError, "no store at") if last else (RuntimeError, f"rank {size - 1}:"), lambda: ShardedStore.open(path))
    dist.barrier()
    if last:
        (path / "elsewhere").rename(shard)
    dist.barrier()
    with ShardedStore.open(path) as store:  # nobody holds a shard any more
        assert len(store) == 500 * size
    pair = dist.new_group([0, 1])  # rank 1 reads the shard of rank 3
    dist.barrier()
    if rank > 1:
        return
    segment = next(shard.glob("segment-*"))
    whole = segment.read_bytes()
    dist.barrier(pair)
    if rank == 1:
        segment.write_bytes(whole[:-200] + bytes(200))
    dist.barrier(pair)
    damaged = (StoreFormatError, "damaged") if rank == 1 else (RuntimeError, "rank 1: expected what succeeds here")
    refused(*damaged, lambda: ShardedStore.open(path, group=pair))
    dist.barrier(pair)
    if rank == 1:
        segment.write_bytes(whole)
    dist.barrier(pair)
    with pytest.MonkeyPatch.context() as patch:
        held = _durable_when_named(patch, rank)
        with ShardedStore.open(path, group=pair, durability="async") as store:
            assert len(store) == 500 * size and store.retrieve([1])[0].tolist() == [[1.0, 1.0]] and held == [len(store.local)]


def _durable_when_named(patch, rank):
    """Rows that are on disk of this rank's new shard when it takes the old ones' place; a disk that takes its time."""
    held, name, sync = [], _shards.write_current, os.fdatasync

    def named(root, number, ranks, rank):
        with KeyValueStore.open(_shards.folder(root, number, rank, ranks)) as store:
            held.append(len(store))
        name(root, number, ranks, rank)

    patch.setattr(_shards, "write_current", named)
    patch.setattr(os, "fdatasync", lambda fd: (time.sleep(0.2), sync(fd)))
    return held
