"""Where the keys of the store's table lie: none further from its home than if what was erased had never been there."""

import random

import pytest
import torch

import memkernels as mk
from memkernels.backends.reference._store_bucket import MOST_PASSED, PLACES, Bucket, kind_of, mix
from memkernels.ops import store_erase_, store_find, store_items, store_move_, store_upsert_


def taken_apart(table):
    return [Bucket(words) for words in table.tolist()]


def steps_of(table):
    """How many buckets all keys passed on their way, after a look at every place and count: what passes is full and knows it."""
    buckets, size = taken_apart(table), table.shape[0]
    passed, kinds, seen = [0] * size, [0] * size, set()
    for b, bucket in enumerate(buckets):
        for place in range(PLACES):
            key = bucket.keys[place]
            if not bucket.taken[place]:
                assert key == bucket.rows[place] == 0
                continue
            assert key not in seen
            seen.add(key)
            at = mix(key) * size >> 64
            while at != b:
                assert all(buckets[at].taken)
                passed[at], kinds[at] = passed[at] + 1, kinds[at] | 1 << kind_of(key)
                at = (at + 1) % size
    for bucket, count, kind in zip(buckets, passed, kinds):
        assert bucket.passed == count or bucket.passed == MOST_PASSED
        assert kind & ~bucket.kinds == 0 and (bucket.passed or not bucket.kinds)
    return sum(passed)


def changed(table, known, source, pool, turns):
    """Random keys stored and erased, single ones and twice in a batch, as in the dict `known`."""
    most = int(0.97 * PLACES * table.shape[0])
    for _ in range(turns):
        keys = [source.choice(pool) for _ in range(source.randrange(1, 2 * table.shape[0] + 2))]
        if source.random() < 0.5:
            assert store_erase_(table, torch.tensor(keys)).tolist() == [known.pop(key, -1) for key in keys]
            continue
        fitting = [key for key in keys if key in known][: most // 2] + keys[: most - len(known)]
        rows = [source.randrange(2**34) for _ in fitting]
        store_upsert_(table, torch.tensor(fitting, dtype=torch.int64), torch.tensor(rows, dtype=torch.int64))
        known.update(zip(fitting, rows))


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("buckets", [1, 6, 130, 700])
def test_erased_keys_leave_nothing_behind(buckets, backend):
    """Tables of one part and of several, nearly full now and then, so that what comes back crosses parts and the end of the table."""
    source, known, table = random.Random(buckets), {}, torch.zeros(buckets, 8, dtype=torch.int64)
    pool = [0, *(source.randrange(-(2**63), 2**63) for _ in range(6 * buckets))]
    with mk.backend(backend):
        changed(table, known, source, pool, turns=40 if buckets < 500 else 12)
        assert store_find(table, torch.tensor(pool)).tolist() == [known.get(key, -1) for key in pool]
        assert {
            key: row for bucket in taken_apart(table) for key, row, taken in zip(bucket.keys, bucket.rows, bucket.taken) if taken
        } == known
        new = torch.zeros_like(table)
        if known:
            store_upsert_(new, torch.tensor(list(known)), torch.tensor(list(known.values())))
        assert steps_of(table) == steps_of(new)  # the order of keys does not matter for the sum
        store_erase_(table, torch.tensor(pool))
        assert not table.any() or all(bucket.passed in (0, MOST_PASSED) for bucket in taken_apart(table))


def test_replacing_all_keys_makes_no_search_longer():
    torch.manual_seed(0)
    table, keys = torch.zeros(2000, 8, dtype=torch.int64), torch.randint(-(2**63), 2**63 - 1, (8000,))  # at load 0.8
    store_upsert_(table, keys, torch.arange(8000))
    before = steps_of(table)
    for turn in range(60):
        begin = 800 * (turn % 10)
        rows = store_erase_(table, keys[begin : begin + 800])
        keys[begin : begin + 800] = torch.randint(-(2**63), 2**63 - 1, (800,))
        store_upsert_(table, keys[begin : begin + 800], rows)
    assert steps_of(table) < 1.3 * before  # 8 times as many where erased places are only marked free
    assert torch.equal(store_find(table, keys).sort().values, torch.arange(8000))


@pytest.mark.parametrize("backend", ["reference", None])
def test_erasing_from_a_table_that_is_half_moved(backend):
    """The buckets that were moved are empty and still say who passed them: none comes back from there."""
    torch.manual_seed(1)
    old, table, keys = (
        torch.zeros(60, 8, dtype=torch.int64),
        torch.zeros(90, 8, dtype=torch.int64),
        torch.randint(-(2**63), 2**63 - 1, (294,)),
    )
    store_upsert_(old, keys, torch.arange(294))
    with mk.backend(backend):
        store_move_(old, table, 0, 35)
        moved = set(store_items(table, 0, 90)[0].tolist())
        left = [key for key in keys.tolist() if key not in moved]
        gone = left[::3]
        expected = {key: row for row, key in enumerate(keys.tolist())}
        assert store_erase_(old, torch.tensor(gone)).tolist() == [expected[key] for key in gone]
        rest = torch.tensor([key for key in left if key not in set(gone)])
        assert store_find(old, rest).tolist() == [expected[key] for key in rest.tolist()]
        store_move_(old, table, 35, 60)
        there = [key for key in expected if key not in set(gone)]
        assert store_find(table, torch.tensor(there)).tolist() == [expected[key] for key in there]
        assert not old.any()
        steps_of(table)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize(("buckets", "count"), [(4123, 20_000), (513 * 256, 500_000)])
def test_several_threads_give_new_keys_their_rows(buckets, count):
    """Keys that left the buckets of their thread lie beside another thread's, and every new key waits for its row."""
    torch.manual_seed(2)
    for _ in range(10 if buckets < 10_000 else 1):
        keys, rows = torch.randint(-(2**63), 2**63 - 1, (count,)), torch.randperm(count)
        table = torch.zeros(buckets, 8, dtype=torch.int64)
        store_upsert_(table, keys, rows, "assign")
        assert torch.equal(store_find(table, keys), rows)
