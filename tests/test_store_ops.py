"""The ops of the key-value store: the same table byte for byte from every backend, sequential meaning, errors that change nothing."""

import random
from functools import cache

import pytest
import torch

import memkernels as mk
from memkernels.backends.reference._store_bucket import mix
from memkernels.ops import ByteKeys, store_erase_, store_find, store_gather, store_items, store_move_, store_scatter_, store_upsert_
from memkernels.store.key_hash import hash_key, owner_hash
from memkernels.store.keys import as_batch

CPP = pytest.mark.skipif(mk.backends()["cpp"] is not None, reason="the C++ extension is not built")


def random_keys(seed, count, among):
    source = random.Random(seed)
    pool = [source.randrange(-(2**63), 2**63) for _ in range(among)]
    return torch.tensor([source.choice(pool) for _ in range(count)], dtype=torch.int64)


def table_of(buckets):
    return torch.zeros(buckets, 8, dtype=torch.int64)


def on_both(function):
    """The result with the reference and with C++, which must be the same."""
    with mk.backend("reference"):
        expected = function()
    with mk.backend("cpp"):
        got = function()
    assert len(expected) == len(got) and all(torch.equal(a, b) for a, b in zip(expected, got))
    return got


@CPP
@pytest.mark.parametrize("mode", ["replace", "keep", "assign"])
@pytest.mark.parametrize("buckets", [1, 7, 300, 700])
def test_backends_write_the_same_bytes(mode, buckets):
    """Tables that are nearly full, so that keys leave their part and wrap around; twice as many keys as places now and then."""

    def run():
        table, found = table_of(buckets), []
        for step in range(4):
            keys = random_keys(step % 3, 2 * buckets, 6 * buckets)
            rows = torch.arange(2**34 - keys.shape[0], 2**34)
            found += store_upsert_(table, keys, rows - 7 * step, mode)
            found += [store_find(table, random_keys(step, buckets, 6 * buckets))]
            found += [store_erase_(table, keys[step::2])]
        return [*found, table]

    on_both(run)


@CPP
def test_threads_write_the_same_bytes():
    keys = random_keys(0, 60000, 40000)

    def run():
        table = table_of(9000)
        found = store_upsert_(table, keys, torch.arange(60000), "assign")
        removed = store_erase_(table, keys[::3])
        return [*found, removed, table]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run()
        for count in (2, 5):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(one, run()))
    finally:
        torch.set_num_threads(threads)


def expected_of(keys, rows, mode, there):
    now, old, fresh = [], [], iter(rows)
    for key, row in zip(keys, rows):
        old.append(there.get(key, -1))
        if key not in there:
            there[key] = next(fresh) if mode == "assign" else row
        elif mode == "replace":
            there[key] = row
        now.append(there[key])
    return now, old


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("mode", ["replace", "keep", "assign"])
def test_elements_are_taken_one_after_the_other(mode, backend):
    table, there = table_of(400), {}
    with mk.backend(backend):
        for step in range(3):
            keys = random_keys(step, 500, 300)
            rows = torch.randperm(500) + 500 * step
            now, old = store_upsert_(table, keys, rows, mode)
            assert (now.tolist(), old.tolist()) == expected_of(keys.tolist(), rows.tolist(), mode, there)
        gone = random_keys(1, 400, 300)
        assert store_erase_(table, gone).tolist() == [there.pop(key, -1) for key in gone.tolist()]
        assert dict(zip(*(side.tolist() for side in store_items(table)))) == there
        everything = torch.tensor(list(there))
        assert store_erase_(table, everything).tolist() == list(there.values())
    assert not table.any()  # no tombstones, no counts, nothing of a key


@pytest.mark.parametrize("backend", ["reference", None])
def test_a_full_table_says_so(backend):
    table, keys = table_of(2), torch.arange(12)
    with mk.backend(backend):
        _, old = store_upsert_(table, keys, keys)
        assert old.tolist() == [-1] * 10 + [-2] * 2
        assert store_find(table, keys).tolist() == [*range(10), -1, -1]


def same_home(count, buckets, home):
    """Keys that all want one bucket: a run that passes several, and a count that grows large."""
    found, key = [], 0
    while len(found) < count:
        if mix(key) * buckets >> 64 == home:
            found.append(key)
        key += 1
    return torch.tensor(found)


@pytest.mark.parametrize("backend", ["reference", None])
def test_keys_of_one_home(backend):
    keys = same_home(60, 16, 14)  # wraps around the end of the table
    table = table_of(16)
    with mk.backend(backend):
        store_upsert_(table, keys, torch.arange(60))
        assert store_find(table, keys).tolist() == list(range(60))
        assert store_erase_(table, keys[::2]).tolist() == list(range(0, 60, 2))
        assert store_find(table, keys).tolist() == [i if i % 2 else -1 for i in range(60)]
        store_erase_(table, keys)
    assert not table.any()


@pytest.mark.parametrize("backend", ["reference", None])
def test_equal_hashes_are_told_apart(backend):
    """Byte keys with the same 64 bits: the bytes decide."""
    texts = ["apple", "pear", "apple", "", "plum"]
    batch = as_batch("", "str", texts)
    table, spans, arena = table_of(4), torch.zeros(8, 2, dtype=torch.int64), torch.zeros(64, dtype=torch.uint8)
    same = torch.zeros(5, dtype=torch.int64)
    byte_keys = ByteKeys(spans, arena, batch.data, batch.offsets, same)
    with mk.backend(backend):
        now, old = store_upsert_(table, same, torch.tensor([3, 1, 4, 0, 5]), "assign", byte_keys)
        assert (now.tolist(), old.tolist()) == ([3, 1, 3, 4, 0], [-1, -1, 3, -1, -1])
        for i, entry in enumerate(now.tolist()):
            begin, end = batch.offsets[i : i + 2].tolist()
            spans[entry] = torch.tensor([begin << 24 | end - begin, 0])
            arena[begin:end] = batch.data[begin:end]
        assert store_find(table, same, byte_keys).tolist() == [3, 1, 3, 4, 0]
        assert store_erase_(table, same[:1], byte_keys).tolist() == [3]
        assert store_find(table, same, byte_keys).tolist() == [-1, 1, -1, 4, 0]


@CPP
def test_hashes_of_bytes():
    keys = [b"", b"\0", b"\0\0", b"a" * 7, b"a" * 8, b"a" * 9, "ä".encode(), bytes(range(200))]
    batch = as_batch("", "bytes", keys)
    assert list(zip(*(half.tolist() for half in batch.hashed()))) == [hash_key(key) for key in keys]
    assert all(len(set(half.tolist())) == len(keys) for half in batch.hashed())
    assert batch.owner_hashes().tolist() == [owner_hash(key) for key in keys]


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("sizes", [(8, 8, 3), (5, 1, 9), (1,), (0,)])
def test_rows_of_chunks(backend, sizes):
    chunks = [torch.randint(0, 255, (n, 11), dtype=torch.uint8)[:, 2:9] for n in sizes]  # rows with gaps between them
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    everything = torch.cat(chunks)
    default = torch.full((1, 7), 9, dtype=torch.uint8)
    rows = torch.randint(-1, max(sum(sizes), 1), (50,)) if sum(sizes) else torch.full((3,), -1)
    with mk.backend(backend):
        assert torch.equal(store_gather(chunks, firsts, rows, default), torch.cat([everything, default])[rows])
        values = torch.randint(0, 255, (rows.shape[0], 7), dtype=torch.uint8)
        store_scatter_(chunks, firsts, rows, values)
        for row, value in zip(rows.tolist(), values):
            if row >= 0:
                everything[row] = value
        assert torch.equal(torch.cat(chunks), everything)
        with pytest.raises(IndexError, match=r"store_scatter_: rows: expected rows that a chunk holds, got 99"):
            store_scatter_(chunks, firsts, torch.tensor([0 if sum(sizes) else -1, 99]), values[:2] + 1)
        with pytest.raises(IndexError, match=r"store_gather: rows: .*99"):
            store_gather(chunks, firsts, torch.tensor([99]), default)
    assert torch.equal(torch.cat(chunks), everything)


@CPP
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_lookups_at_every_level(level):
    """Full tables, where a key that is not there goes round, and rows too many for the caches, read and written."""
    from memkernels._C import supported_levels

    if level not in supported_levels():
        pytest.skip(f"no {level} here")
    before = mk.cpu_level()
    mk.cpu_level(level)
    try:
        for buckets in (1, 2, 40):
            table, keys = table_of(buckets), torch.arange(5 * buckets)
            store_upsert_(table, keys, keys)
            on_both(lambda table=table, buckets=buckets: [store_find(table, torch.arange(-3, 5 * buckets + 90))])
        chunks, default = [torch.arange(64 * 256).remainder(251).to(torch.uint8).view(64, 256)], torch.zeros(1, 256, dtype=torch.uint8)
        rows = torch.randint(-1, 64, (20_000,))
        assert torch.equal(store_gather(chunks, [0], rows, default), torch.cat([chunks[0], default])[rows])
        values = torch.randint(0, 256, (rows.shape[0], 256), dtype=torch.uint8)
        last = {row: i for i, row in enumerate(rows.tolist()) if row >= 0}
        for offset in (0, 1):  # whole lines, and rows that begin anywhere
            target = torch.zeros(offset + 64 * 256, dtype=torch.uint8)[offset:].view(64, 256)
            store_scatter_([target], [0], rows, values)
            assert torch.equal(target, torch.stack([values[last[row]] if row in last else target[row] * 0 for row in range(64)]))
    finally:
        mk.cpu_level(before)


def move_as_before(old, table, begin, end):
    """store_move_ by the ops it takes the place of."""
    keys, rows = store_items(old, begin, end)
    store_upsert_(table, keys, rows, "insert")
    if end == old.shape[0]:
        old.zero_()
    else:
        old[begin:end, :7] = 0
        old[begin:end, 7] &= -(1 << 52)


def moved_in_steps(move, old, table, step):
    """Both tables after every step."""
    old, table, after = old.clone(), table.clone(), []
    for begin in range(0, old.shape[0], step):
        move(old, table, begin, min(begin + step, old.shape[0]))
        after += [old.clone(), table.clone()]
    assert not old.any()
    return after


@cache
def worn(buckets, load):
    """A table in use for a while, not to be changed: full buckets, keys that wrap around, and places that became free."""
    table, keys = table_of(buckets), random_keys(buckets, int(5 * buckets * load), 100 * buckets)
    store_upsert_(table, keys, torch.arange(2**34 - keys.shape[0], 2**34))
    store_erase_(table, keys[::7])
    return table


@cache
def moved_as_before(load, buckets, step):
    return moved_in_steps(move_as_before, worn(20_000, load), table_of(buckets), step)


@CPP
@pytest.mark.parametrize(("buckets", "step"), [(1, 1), (7, 3), (300, 256), (300, 300), (1100, 999), (1100, 1100)])
def test_moving_is_inserting_in_every_backend(buckets, step):
    old, table = worn(buckets, 0.98), table_of(buckets + buckets // 8 + 1)
    store_upsert_(table, random_keys(10**6, buckets // 3 + 1, buckets), torch.arange(buckets // 3 + 1))
    got = on_both(lambda: moved_in_steps(store_move_, old, table, step))
    assert all(torch.equal(a, b) for a, b in zip(got, moved_in_steps(move_as_before, old, table, step)))


@CPP
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_moving_by_any_number_of_threads(level):
    """More keys than a slice, in old tables with long chains, into tables that are larger, nearly as small, and of few parts."""
    from memkernels._C import supported_levels

    if level not in supported_levels():
        pytest.skip(f"no {level} here")
    before, threads = mk.cpu_level(), torch.get_num_threads()
    mk.cpu_level(level)
    try:
        for load, buckets in ((0.9, 30_000), (0.97, 17_000), (0.01, 300)):
            for step in (20_000, 17_001):
                expected = moved_as_before(load, buckets, step)
                for count in (1, 2, 5):
                    torch.set_num_threads(count)
                    got = moved_in_steps(store_move_, worn(20_000, load), table_of(buckets), step)
                    assert all(torch.equal(a, b) for a, b in zip(got, expected))
    finally:
        torch.set_num_threads(threads)
        mk.cpu_level(before)


@pytest.mark.parametrize("backend", ["reference", None])
def test_moving_keys_of_one_home(backend):
    """A chain that wraps around the end of the old table: what is not moved yet is still found."""
    keys = same_home(60, 16, 14)
    old, table = table_of(16), table_of(24)
    with mk.backend(backend):
        store_upsert_(old, keys, torch.arange(60))
        assert store_move_(old, table, 0, 15).tolist() == [55]
        rows, left = store_find(table, keys), store_find(old, keys)
        assert torch.maximum(rows, left).tolist() == list(range(60)) and int((left >= 0).sum()) == 5
        assert store_move_(old, table, 15).tolist() == [5] and not old.any()
        assert store_find(table, keys).tolist() == list(range(60))
        assert store_move_(old, table).tolist() == [0] and store_move_(old, table, 3, 3).tolist() == [0]


def test_gaps_between_chunks():
    chunks, default = [torch.full((2, 1), c, dtype=torch.uint8) for c in (1, 2)], torch.zeros(1, 1, dtype=torch.uint8)
    for backend in ("reference", None):
        with mk.backend(backend):
            assert store_gather(chunks, [3, 8], torch.tensor([4, 8, 9, 3, -5]), default)[:, 0].tolist() == [1, 2, 2, 1, 0]
            with pytest.raises(IndexError, match="got 5"):
                store_gather(chunks, [3, 8], torch.tensor([5]), default)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t, k: store_find(t.int(), k), TypeError, "store_find: table: expected int64, got int32"),
        (lambda t, k: store_find(t[:, :7], k), ValueError, r"store_find: table: expected a contiguous tensor \[buckets, 8\], got shape"),
        (lambda t, k: store_find(t[:0], k), ValueError, "store_find: table: expected at least one bucket, got none"),
        (lambda t, k: store_find(t, k.float()), TypeError, "store_find: keys: expected int64, got float32"),
        (lambda t, k: store_upsert_(t, k, k, "put"), ValueError, "store_upsert_: mode: expected one of 'replace', .* got 'put'"),
        (lambda t, k: store_upsert_(t, k, k - 9), ValueError, "store_upsert_: rows: expected rows from 0 to .*, got -9 to"),
        (lambda t, k: store_upsert_(t, k, k + 2**34), ValueError, "store_upsert_: rows: expected rows from 0"),
        (lambda t, k: store_upsert_(t, k, k[:1]), ValueError, "store_upsert_: rows: expected 1 dimensions of at least 3"),
        (lambda t, k: store_erase_(t, k[None]), ValueError, "store_erase_: keys: expected 1 dimensions, got shape"),
        (lambda t, k: store_items(t, 3, 2), ValueError, "store_items: begin, end: expected 0 <= begin"),
        (lambda t, k: store_move_(t, table_of(9), 0, 5), ValueError, "store_move_: begin, end: expected 0 <= begin"),
        (lambda t, k: store_move_(t, t), ValueError, "store_move_: table: expected another table than old, got the same"),
        (lambda t, k: store_move_(t, t[:0]), ValueError, "store_move_: table: expected at least one bucket, got none"),
        (lambda t, k: store_move_(t.int(), table_of(9)), TypeError, "store_move_: old: expected int64, got int32"),
    ],
)
def test_errors_change_nothing(call, error, message):
    table, keys = table_of(4), torch.arange(3)
    store_upsert_(table, keys, keys)
    before = table.clone()
    with pytest.raises(error, match=message):
        call(table, keys)
    assert torch.equal(table, before)


def test_explain_and_versions():
    table, keys = table_of(4), torch.arange(3)
    assert mk.explain("store_find", table, keys)["reference"] is None
    assert mk.explain(store_upsert_, table, keys, keys)["reference"] is None
    assert not table.any()
    version = table._version
    store_upsert_(table, keys, keys)
    assert table._version > version
    old, larger = table.clone(), table_of(9)
    store_move_(old, larger)
    assert old._version > 0 and larger._version > 0
    assert torch.ops.memkernels.store_find.default(table, keys, None, None, None, None, None)[0].tolist() == [0, 1, 2]
