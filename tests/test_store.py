"""KeyValueStore: columns, capacity, growth, erasing for good, parameters, files, errors."""

import sys

import pytest
import torch
from store_logs import plain

import memkernels as mk
from memkernels.ops import store_move_, store_upsert_
from memkernels.store import index as index_module
from memkernels.store import text_of, text_rows
from memkernels.store.keys import as_batch

NEW, REPLACED, KEPT, ADDED = range(4)


def filled(count=10, **options):
    store = mk.KeyValueStore(2, **options)
    store.store(range(count), torch.arange(2.0 * count).view(count, 2))
    return store


def test_articles_example():
    store = mk.KeyValueStore(16, torch.uint8, key_type="str")
    store.store(["apple", "carrot"], text_rows(["A fruit", "A vegetable"], 16))
    values, found = store.retrieve(["apple", "carrot", "pear"])
    assert text_of(values) == ["A fruit", "A vegetable", ""] and found.tolist() == [True, True, False]
    assert "apple" in store and store.get("pear") is None


@pytest.mark.parametrize("shape", [(), 3, (2, 3), (0,), (5, 0, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.int16, torch.complex64])
def test_shapes_and_dtypes(shape, dtype):
    sizes = (shape,) if isinstance(shape, int) else shape
    values = torch.randint(0, 2, (5, *sizes)).to(dtype)
    store = mk.KeyValueStore(shape, dtype)
    assert store.store([3, 1, 3, 2, 9], values).tolist() == [NEW, NEW, REPLACED, NEW, NEW]
    got, found = store.retrieve([9, 4, 3])
    assert got.dtype == dtype and got.shape == (3, *sizes) and found.tolist() == [True, False, True]
    assert torch.equal(got, torch.stack([values[4], torch.zeros_like(values[0]), values[2]]))


def test_columns():
    store = mk.KeyValueStore(columns={"value": ((2,), torch.float32), "score": ((), torch.int64)}, key_type="bytes")
    store.store([b"a", b"b"], {"value": torch.eye(2), "score": torch.tensor([5, 6])})
    values, found = store.retrieve([b"b", b"c"], default={"score": -1})
    assert values["score"].tolist() == [6, -1] and values["value"].tolist() == [[0, 1], [0, 0]] and found.tolist() == [True, False]
    assert list(store.retrieve([b"a"], columns="score")[0]) == ["score"] and store.retrieve([b"a"], columns=[])[0] == {}
    assert mk.KeyValueStore(2).retrieve([1], columns=[])[0] == {}
    assert store.get(b"a")["score"] == 5 and store.get(b"z") is None


def test_values_of_any_stride():
    store, values = mk.KeyValueStore((2, 3)), torch.randn(3, 2, 8).transpose(0, 2)[::2, ..., :3].transpose(1, 2)
    values = torch.randn(3, 2, 9)[..., ::3].flip(2) if values.shape[1:] != (2, 3) else values
    store.store([1, 2, 3], values)
    assert torch.equal(store.retrieve([1, 2, 3])[0], values)
    store.store([1, 2], torch.randn(1, 2, 3).expand(2, 2, 3))
    assert torch.equal(*store.retrieve([1, 2])[0])
    store.store(torch.tensor([[1, 9], [2, 9]])[:, 0], torch.zeros(2, 2, 3))
    assert not store.retrieve([1, 2])[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_accumulate(dtype):
    store = mk.KeyValueStore((), dtype)
    store.store([7], torch.tensor([10], dtype=dtype))
    assert store.store([7, 8, 7, 8], torch.tensor([1, 2, 3, 4], dtype=dtype), accumulate=True).tolist() == [ADDED, NEW, ADDED, ADDED]
    assert store.retrieve([7, 8])[0].tolist() == [14, 6]
    store.erase([8])
    store.store([8], torch.tensor([1], dtype=dtype), accumulate=True)
    assert store.get(8) == 1  # begins at zero, whatever lay in the row before


def test_a_full_store_refuses_and_stays():
    store = mk.KeyValueStore((), torch.int64, capacity=3, on_full="error")
    store.store([1, 2, 2, 3], torch.arange(4))
    before = store.state_dict()
    with pytest.raises(ValueError, match=r"store: keys: expected at most 3 keys .*got 5 with this batch"):
        store.store([1, 4, 4, 5], torch.arange(4))
    after = store.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    store.store([1, 3], torch.arange(2))
    assert len(store) == 3


@pytest.mark.parametrize("key_type", ["int64", "str"])
def test_least_recently_used_goes_first(key_type):
    key = (lambda *ks: [*ks]) if key_type == "int64" else (lambda *ks: [f"k{k}" for k in ks])
    store = mk.KeyValueStore((), torch.int64, capacity=4, on_full="lru", key_type=key_type)
    store.store(key(1, 2, 3, 4), torch.tensor([1, 2, 3, 4]))
    store.retrieve(key(1))
    store.contains(key(2))  # is no use
    status, evicted = store.store(key(5, 6), torch.tensor([5, 6]), return_evicted=True)
    assert status.tolist() == [NEW, NEW]
    assert sorted(plain(evicted.keys)) == key(2, 3) and sorted(evicted.values.tolist()) == [2, 3]
    assert store.contains(key(1, 2, 3, 4, 5, 6)).tolist() == [True, False, False, True, True, True]
    _, evicted = store.store(key(4, 7), torch.tensor([4, 7]), return_evicted=True)  # 4 is named by the batch and stays
    assert plain(evicted.keys) == key(1)
    assert store.store(key(4), torch.tensor([0]), return_evicted=True)[1] is None
    assert len(store) == 4


def test_least_frequently_used_goes_first():
    store = mk.KeyValueStore((), torch.int64, capacity=3, on_full="lfu")
    store.store([1, 2, 3], torch.arange(3))
    for key in (1, 1, 3):
        store.get(key)
    assert store.store([4], torch.tensor([4]), return_evicted=True)[1].keys.tolist() == [2]
    assert store.store([5, 6], torch.tensor([5, 6]), return_evicted=True)[1].keys.tolist() == [4, 3]


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_eviction_is_what_a_list_says(policy, place, tmp_path):
    """Against a model that keeps (use, row) for every key; batches larger than the store come in slices."""
    path = None if place == "memory" else tmp_path / "s"
    store = mk.KeyValueStore((), torch.int64, capacity=8, on_full=policy, path=path, durability="none")
    clock, use, rows, free = 0, {}, {}, list(range(8))[::-1]
    torch.manual_seed(0)
    for _ in range(60):
        batch = torch.randint(0, 24, (int(torch.randint(1, 6, ())),)).tolist()
        clock += 1
        new = [k for k in dict.fromkeys(batch) if k not in use]
        gone = sorted((k for k in use if k not in batch), key=lambda k: (use[k], rows[k]))[: max(0, len(use) + len(new) - 8)]
        _, evicted = store.store(batch, torch.tensor(batch), return_evicted=True)
        assert (evicted.keys.tolist() if evicted else []) == gone
        for key in gone:
            use.pop(key)
            free.append(rows.pop(key))
        for key in batch:
            clock += 1
            if key not in rows:
                rows[key] = free.pop()
            use[key] = clock if policy == "lru" else use.get(key, 0) + 1
        assert {k for keys, _ in store.items() for k in keys.tolist()} == set(use)
    store.store(range(100, 130), torch.arange(30))
    assert len(store) == 8 and bool(store.contains(range(124 if policy == "lfu" else 122, 130)).all())


def test_growth_is_spread_over_calls(monkeypatch):
    """No call touches more than its own keys and a bounded number of others, however large the table is."""
    moved = []

    def counted(table, keys, rows, mode="replace", byte_keys=None):
        moved[-1] += keys.shape[0]
        return store_upsert_(table, keys, rows, mode, byte_keys)

    def counted_move(*args):
        count = store_move_(*args)
        moved[-1] += int(count)
        return count

    monkeypatch.setattr(index_module, "store_upsert_", counted)
    monkeypatch.setattr(index_module, "store_move_", counted_move)
    store, worst = mk.KeyValueStore((), torch.int64), 0
    for begin in range(0, 40000, 50):
        moved.append(0)
        store.store(torch.arange(begin, begin + 50), torch.arange(50))
        worst = max(worst, moved[-1])
    assert 2 * 50 < worst <= 2 * 50 + 5 * index_module.LEAST_STEP
    assert len(store) == 40000 and torch.equal(store.retrieve(range(40000))[0], torch.arange(40000) % 50)
    assert store._data.index.nbytes / 40000 <= 40  # both tables while it grows; 24 after
    store._data.index.reserve(40001)


@pytest.mark.parametrize("known", [0, 5, 9000, 20000])
def test_a_large_batch_in_a_full_table(known):
    """Whether it grows is decided by a sample where that knows none of the keys, by all keys otherwise; keys of the old table are found."""
    index = index_module.Index()
    index.upsert(as_batch("", "int64", torch.arange(100_000)), torch.arange(100_000))
    size = index.table.shape[0]
    batch = torch.cat([torch.arange(200_000, 220_000 - known), torch.arange(known)]).roll(7)
    before = index.upsert(as_batch("", "int64", batch), torch.arange(20_000))
    assert torch.equal(before, torch.where(batch < 100_000, batch, -1))
    assert (index.table.shape[0] > size) == (known < 20_000) and len(index) == 120_000 - known
    assert torch.equal(index.find(as_batch("", "int64", batch)), torch.arange(20_000))


@pytest.mark.parametrize("count", [1000, 30000, 100000])
def test_memory_of_an_entry(count):
    store = mk.KeyValueStore((), torch.int64)
    store.store(torch.arange(count), torch.arange(count))
    assert store._data.index.nbytes <= 24 * count


def buffers(store):
    data = store._data
    tensors = [*data.index.tables(), *(chunk for chunks in data.pool.chunks.values() for chunk in chunks), data.pool.numbers._free]
    if data.index.texts:
        tensors += [data.index.texts.arena, data.index.texts.spans]
    return tensors


def holds(tensors, secret):
    return any(secret in t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors if t.numel())


@pytest.mark.parametrize("key_type", ["int64", "str", "bytes"])
def test_erased_for_good(key_type):
    """What was erased or overwritten is in no buffer: not in those in use, and not in those that were given up."""
    secret_key = {"int64": 0x5EC2E7C0DEADBEEF - 2**63, "str": "the secret key", "bytes": b"the secret key"}[key_type]
    others = {"int64": range(300), "str": [f"key {i}" for i in range(300)], "bytes": [b"key %d" % i for i in range(300)]}[key_type]
    as_bytes = secret_key.to_bytes(8, "little", signed=True) if key_type == "int64" else b"the secret key"
    store = mk.KeyValueStore(4, torch.uint8, key_type=key_type)
    store.store([secret_key], torch.tensor([[201, 202, 203, 204]], dtype=torch.uint8))
    given_up = buffers(store)
    store.store(others, torch.zeros(300, 4, dtype=torch.uint8))
    given_up += buffers(store)
    secret = bytes([201, 202, 203, 204])
    assert holds(given_up, secret) and (key_type == "int64" or holds(given_up, as_bytes))
    store.erase([secret_key])
    assert not holds(buffers(store), as_bytes)
    store.compact(erase=True)
    assert not holds([*given_up, *buffers(store)], secret) and not holds([*given_up, *buffers(store)], as_bytes)
    assert len(store) == 300 and bool(store.contains(others).all())


def test_compact_keeps_what_lru_knows():
    store = mk.KeyValueStore((), torch.int64, capacity=4, on_full="lru")
    store.store([1, 2, 3, 4], torch.arange(4))
    store.get(1)
    store.erase([4])
    store.compact()
    store.store([5, 6], torch.arange(2))
    assert store.contains([1, 3, 5, 6]).tolist().count(True) == 4 or store.contains([1, 2, 5, 6]).all()


def test_parameter():
    store = filled()
    store.erase([0])
    bank = store.as_parameter()
    values, _ = store.retrieve([3, 99, 3, 4], default=1)
    assert values.tolist()[1] == [1, 1]
    (values * torch.tensor([[1.0], [5.0], [2.0], [1.0]])).sum().backward()
    assert bank.grad.sum() == 8 and bank.grad.abs().max() == 3
    with torch.no_grad():
        bank += 100
    assert store.get(4).tolist() == [108, 109]
    store.store([4, 77], torch.zeros(2, 2))
    assert store.get(4).tolist() == [0, 0] and len(store) == 10 and store.as_parameter() is bank
    with pytest.raises(ValueError, match="which the parameter of as_parameter"):
        store.store([5, 200], torch.ones(2, 2))
    assert store.get(5).tolist() == [110, 111] and 200 not in store
    with pytest.raises(TypeError, match="as_parameter: store: expected a column of a floating dtype"):
        mk.KeyValueStore(dtype=torch.int64).as_parameter()


def test_parameter_gradcheck():
    store = mk.KeyValueStore(3, torch.float64)
    store.store([1, 2, 3], torch.randn(3, 3, dtype=torch.float64))
    bank = store.as_parameter()

    def read(values):
        store._parameters["value"] = values
        return store.retrieve([2, 9, 2, 1])[0]

    store._parameters = {"value": bank}
    assert torch.autograd.gradcheck(read, (bank.detach().clone().requires_grad_(),))


@pytest.mark.parametrize("key_type", ["int64", "str", "bytes"])
def test_safetensors(tmp_path, key_type):
    keys = {"int64": [1, -5], "str": ["ä", ""], "bytes": [b"\0", b""]}[key_type]
    store = mk.KeyValueStore(2, torch.bfloat16, key_type=key_type)
    store.store(keys, torch.ones(2, 2, dtype=torch.bfloat16))
    file = tmp_path / "store.safetensors"
    store.export_safetensors(file)
    other = mk.KeyValueStore(2, torch.bfloat16, key_type=key_type)
    other.import_safetensors(file)
    assert other.contains(keys).all() and torch.equal(other.get(keys[0]), torch.ones(2, dtype=torch.bfloat16))
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    wrong = "bytes" if key_type == "int64" else "int64"
    with pytest.raises(ValueError, match=f"import_safetensors: path: expected {wrong} keys, got {key_type} keys"):
        mk.KeyValueStore(2, torch.bfloat16, key_type=wrong).import_safetensors(file)
    with pytest.raises(TypeError, match=r"import_safetensors: values\['value'\]: expected float32, got bfloat16"):
        mk.KeyValueStore(2, key_type=key_type).import_safetensors(file)
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="import_safetensors: path: expected a safetensors file"):
        other.import_safetensors(file)


def test_safetensors_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="export_safetensors: needs the package safetensors"):
        filled().export_safetensors("x")


STATES = {
    "missing": lambda s: s.pop("keys"),
    "dtype": lambda s: s.update(keys=s["keys"].float()),
    "count": lambda s: s.update(keys=s["keys"][:3]),
    "shape": lambda s: s.update({"column.value": s["column.value"][:, :1]}),
}


def test_safetensors_of_dtypes_the_format_does_not_have(tmp_path):
    columns = {"a": ((2,), torch.complex128), "b": ((), torch.complex128), "c": ((2,), torch.float64)}
    store, other = (mk.KeyValueStore(columns=columns) for _ in range(2))
    values = {"a": torch.randn(3, 2, dtype=torch.complex128), "b": torch.randn(3, dtype=torch.complex128), "c": torch.rand(3, 2).double()}
    store.store([1, 2, 3], values)
    store.export_safetensors(tmp_path / "s")
    other.import_safetensors(tmp_path / "s")
    assert all(torch.equal(other.retrieve([1, 2, 3])[0][name], values[name]) for name in columns)


@pytest.mark.parametrize("name", STATES)
def test_a_wrong_state_changes_nothing(name):
    store, state = filled(), filled().state_dict()
    STATES[name](state)
    with pytest.raises((ValueError, TypeError), match="load_state_dict: "):
        store.load_state_dict(state)
    assert len(store) == 10 and store.get(9).tolist() == [18, 19]


@pytest.mark.parametrize("offsets", [[0, 5], [1, 2, 3], [0, 3, 2, 3], [], [0, -1, 3]])
def test_offsets_of_a_state_are_checked(offsets):
    store = mk.KeyValueStore(key_type="str")
    count = max(len(offsets) - 1, 0)
    state = {"key_data": torch.zeros(3, dtype=torch.uint8), "key_offsets": torch.tensor(offsets, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"load_state_dict: state\['key_offsets'\]"):
        store.load_state_dict({**state, "column.value": torch.zeros(count)})


ERRORS = [
    (lambda s: s.store([1.5], torch.zeros(1, 2)), TypeError, r"store: keys\[0\]: expected an int, got float"),
    (lambda s: s.store([2**63], torch.zeros(1, 2)), ValueError, r"store: keys\[0\]: expected an int of 64 bits with sign, got 92"),
    (lambda s: s.store([True], torch.zeros(1, 2)), TypeError, r"store: keys\[0\]: expected an int, got bool"),
    (lambda s: s.store("ab", torch.zeros(2, 2)), TypeError, "store: keys: expected a tensor or a sequence of ints, got str"),
    (lambda s: s.store(torch.ones(2), torch.zeros(2, 2)), TypeError, "store: keys: expected int64 keys, got float32"),
    (lambda s: s.store(torch.ones(1, 2).long(), torch.zeros(2, 2)), ValueError, "store: keys: expected one dimension, got shape"),
    (
        lambda s: s.store([1], torch.zeros(2, 2)),
        ValueError,
        r"store: values: expected shape \(1, 2\), one value for each key, got shape \(2, 2\)",
    ),
    (lambda s: s.store([1], torch.zeros(1, 2).double()), TypeError, "store: values: expected float32, got float64"),
    (lambda s: s.store([1], [[1.0, 2.0]]), TypeError, "store: values: expected a tensor, got list"),
    (lambda s: s.store([1], {"score": torch.zeros(1)}), ValueError, "store: values: expected columns value, got score"),
    (
        lambda s: s.store([1], torch.zeros(1, 2), if_absent=True, accumulate=True),
        ValueError,
        "store: accumulate: expected False with if_absent",
    ),
    (lambda s: s.store([1], torch.zeros(1, 2), if_absent=1), TypeError, "store: if_absent: expected True or False, got 1"),
    (lambda s: s.retrieve([1], default=torch.zeros(3)), ValueError, "retrieve: default: expected a number or a tensor that fits"),
    (
        lambda s: mk.KeyValueStore((), torch.int64).retrieve([1], default=0.5),
        ValueError,
        "default: expected a number that int64 holds, got 0.5",
    ),
    (lambda s: s.store(torch.ones(1, device="meta").long(), torch.zeros(1, 2)), ValueError, "store: keys: expected keys on a device that"),
    (lambda s: s.store([1], torch.zeros(1, 2, device="meta")), ValueError, "store: values: expected values on a device that holds data"),
    (lambda s: s.snapshot(b"x"), TypeError, "snapshot: path: expected a str or a pathlib.Path, got bytes"),
    (lambda s: s.get(None), TypeError, r"get: keys\[0\]: expected an int, got NoneType"),
    (lambda s: s.retrieve([1], columns=5), TypeError, "retrieve: columns: expected names of columns, or None, got int"),
    (lambda s: s.retrieve([1], columns="score"), ValueError, "retrieve: columns: expected one of 'value', got 'score'"),
    (lambda s: s.rollback(), ValueError, "rollback: store: expected a store with a path, got one in memory"),
    (lambda s: s.as_parameter(capacity=2), ValueError, "as_parameter: capacity: expected at least the 10 rows in use, got 2"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_change_nothing(call, error, message):
    store = filled()
    before = store.state_dict()
    with pytest.raises(error, match=message):
        call(store)
    after = store.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        (["a", 1], TypeError, r"keys\[1\]: expected str, got int"),
        (["a", b"b"], TypeError, r"keys\[1\]: expected str, got bytes"),
        (["a", "\ud800"], ValueError, r"keys\[1\]: expected a str with a UTF-8 form"),
        ("ab", TypeError, "keys: expected a sequence of str, got str"),
        (["x" * (1 << 24)], ValueError, r"keys\[0\]: expected at most 16777215 bytes, got 16777216"),
    ],
)
def test_wrong_text_keys(keys, error, message, backend):
    store = mk.KeyValueStore(key_type="str")
    with mk.backend(backend), pytest.raises(error, match=message):
        store.contains(keys)


CREATION = [
    (dict(capacity=2**70), ValueError, "KeyValueStore: capacity: expected a number of keys from 1 to"),
    (dict(device="foo"), ValueError, "KeyValueStore: device: expected a device such as 'cpu' or 'cuda', got 'foo'"),
    (dict(device="meta"), ValueError, "KeyValueStore: device: expected a device that holds data, got 'meta'"),
    (dict(device="cuda:99"), ValueError, "KeyValueStore: device: expected a device that is there, got 'cuda:99'"),
    (dict(path=5), TypeError, "KeyValueStore: path: expected a str or a pathlib.Path, got int"),
    (dict(path=""), ValueError, "KeyValueStore: path: expected the name of a file or directory, got ''"),
    (dict(path="a\0"), ValueError, "KeyValueStore: path: expected the name of a file or directory"),
    (dict(key_type="int32"), ValueError, "KeyValueStore: key_type: expected one of"),
    (dict(on_full="lru"), ValueError, "KeyValueStore: capacity: expected a number of keys with on_full='lru', got None"),
    (dict(capacity=0), ValueError, "KeyValueStore: capacity: expected a number of keys from 1 to"),
    (dict(value_shape=(-1,)), ValueError, "KeyValueStore: value_shape: expected sizes of 0 or more"),
    (dict(dtype="float32"), TypeError, "KeyValueStore: dtype: expected a torch.dtype"),
    (dict(columns={}), TypeError, "KeyValueStore: columns: expected"),
    (dict(columns={"a": 3}), TypeError, r"KeyValueStore: columns\['a'\]: expected \(shape, dtype\)"),
]


@pytest.mark.parametrize(("options", "error", "message"), CREATION)
def test_wrong_creation(options, error, message):
    with pytest.raises(error, match=message):
        mk.KeyValueStore(**options)


def test_closed():
    with filled() as store:
        pass
    assert store.closed and repr(store) == "KeyValueStore(closed)"
    store.close()
    with pytest.raises(ValueError, match="get: store: expected an open store, got a closed one"):
        store.get(1)


def test_iteration_notices_changes():
    store = filled()
    with pytest.raises(RuntimeError, match="items: expected a store that stays as it is during iteration"):
        for _ in store.items():
            store.erase([1])
