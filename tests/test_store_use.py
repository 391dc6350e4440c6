"""The key-value store as others use it: processes that fork, directories that change, threads, stores nobody closed."""

import copy
import gc
import os
import threading

import pytest
import torch
from child import run_python

import memkernels as mk
from memkernels.store import StoreError, StoreFormatError


def numbers(keys):
    return torch.tensor(keys, dtype=torch.float32)


def saved(path, keys, **options):
    store = mk.KeyValueStore(path=path, **options)
    store.store(keys, numbers(keys))
    store.commit()
    return store


def in_child(look):
    """What `look` says in a forked process, which begins when the function that is returned is called."""
    (go, start), (out, into) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(go, 1)
        try:
            answer = repr(look())
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(into, answer.encode())
        os._exit(0)

    def answer():
        os.write(start, b"x")
        os.waitpid(pid, 0)
        found = os.read(out, 10_000).decode()
        for end in (go, start, out, into):
            os.close(end)
        return found

    return answer


@pytest.mark.parametrize("look", ["verify", "snapshot"])
def test_refresh_gives_what_something_else_has_seen_before(tmp_path, look):
    with saved(tmp_path / "s", [1]) as store, mk.KeyValueStore.open(tmp_path / "s") as reader:
        store.store([2], numbers([2]))
        store.commit()
        reader.verify() if look == "verify" else reader.snapshot(tmp_path / "copy")
        assert 2 not in reader
        assert reader.refresh() and reader.get(2) == 2 and not reader.refresh()


@pytest.mark.parametrize("mode", ["r", "w"])
def test_a_forked_child_reads_right_values_after_a_rewrite(tmp_path, mode):
    writer = saved(tmp_path / "s", list(range(100)))
    writer.erase(list(range(90)))
    writer.commit()
    store = writer if mode == "w" else mk.KeyValueStore.open(tmp_path / "s")  # of which nothing was read before the fork
    answer = in_child(lambda: (store.get(95).item(), store.verify().ok, store.refresh(), store.get(99).item(), store.get(500).item()))
    stale = in_child(lambda: (store.verify().ok, store.get(95)))  # the rows of the new files are others than those it knows
    writer.compact()
    writer.store(list(range(500, 600)), numbers(list(range(500, 600))))
    writer.commit()
    assert answer() == "(95.0, True, True, 99.0, 500.0)"
    assert "was rewritten: refresh first" in stale()
    store.close()
    writer.close()


def test_a_forked_child_reads_no_erased_rows(tmp_path):
    writer = saved(tmp_path / "s", [1, 2])
    answer = in_child(lambda: writer.get(1))
    after = in_child(lambda: (writer.refresh(), writer.get(1), writer.get(2).item()))
    writer.erase([1])
    writer.compact(erase=True)
    assert "may have been erased: refresh first" in answer()
    assert after() == "(True, None, 2.0)"
    writer.close()


def test_fork_while_another_thread_has_the_store():
    store = mk.KeyValueStore()
    store.store([1], numbers([1]))
    held, done = threading.Event(), threading.Event()

    def hold(changing):
        with store._opened("test", changing):
            held.set()
            done.wait()

    for changing, expected in [(False, "1.0"), (True, "StoreError: get: store: another thread was writing to it")]:
        held.clear()
        done.clear()
        thread = threading.Thread(target=hold, args=(changing,))
        thread.start()
        held.wait()
        answer = in_child(lambda: store.get(1).item())
        done.set()
        thread.join()
        assert answer().startswith(expected)
    assert store.get(1) == 1


def test_a_relative_path_stays_where_it_was(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "b")
    saved("s", [1]).close()
    monkeypatch.chdir(tmp_path / "a")
    store = mk.KeyValueStore(path="s")
    monkeypatch.chdir(tmp_path / "b")  # where there is a store of that name
    store.store([2], numbers([2]))
    store.commit()
    store.close()
    for name, key in [("a", 2), ("b", 1)]:
        with mk.KeyValueStore.open(tmp_path / name / "s") as reader:
            assert len(reader) == 1 and reader.get(key) == key and reader.verify().ok


def test_a_store_without_its_marker_is_not_made_anew(tmp_path):
    saved(tmp_path / "s", [1]).close()
    marker = (tmp_path / "s" / "ENGINE").read_bytes()
    (tmp_path / "s" / "ENGINE").unlink()
    with pytest.raises(StoreFormatError, match=r"holds segment-00000001.mkv but no ENGINE"):
        mk.KeyValueStore(path=tmp_path / "s")
    with mk.KeyValueStore(()) as other, pytest.raises(StoreFormatError, match="no ENGINE"):
        other.snapshot(tmp_path / "s")
    (tmp_path / "s" / "ENGINE").write_bytes(marker)
    with mk.KeyValueStore.open(tmp_path / "s") as store:
        assert store.get(1) == 1


def test_a_directory_of_others_stays_as_it_is(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(StoreError, match="is not empty: mine"):
        mk.KeyValueStore(path=tmp_path)
    assert os.listdir(tmp_path) == ["mine"]


@pytest.mark.parametrize("durability", ["none", "async", "commit"])
def test_a_store_that_nobody_closed_lets_the_next_writer_in(tmp_path, durability):
    store = saved(tmp_path / "s", [1], durability=durability)
    if durability == "async":
        store._data.log.wait()
    del store
    gc.collect()
    with mk.KeyValueStore(path=tmp_path / "s") as store:
        assert store.get(1) == 1


def test_commits_in_the_background_are_written_when_the_process_ends(tmp_path):
    run_python(
        "import memkernels as mk, torch\n"
        f"s = mk.KeyValueStore(path={str(tmp_path / 's')!r}, durability='async')\n"
        "for i in range(20):\n    s.store([i], torch.ones(1))\n    s.commit()\n"
    )
    with mk.KeyValueStore.open(tmp_path / "s") as store:
        assert len(store) == 20


@pytest.mark.parametrize("durability", ["none", "async"])
def test_erased_for_good_also_from_a_journal_of_an_earlier_writer(tmp_path, durability):
    run_python(
        "import os, memkernels as mk, torch\n"
        f"s = mk.KeyValueStore(path={str(tmp_path / 's')!r}, key_type='str')\n"
        "s.store(['a secret key'], torch.ones(1))\ns.commit()\nos._exit(0)\n"
    )
    with mk.KeyValueStore.open(tmp_path / "s", "w", durability=durability) as store:
        store.erase(["a secret key"])
        store.compact(erase=True)
    assert not any(b"a secret key" in file.read_bytes() for file in (tmp_path / "s").iterdir())


def test_other_threads_may_read_during_iteration():
    store = mk.KeyValueStore()
    store.store([1, 2], numbers([1, 2]))
    batches, found = store.items(), []
    next(batches)
    thread = threading.Thread(target=lambda: found.append(store.get(1)), daemon=True)
    thread.start()
    thread.join(120)  # a thread that waits for the iteration would wait for ever
    assert found == [1]
    store.store([1], numbers([5]))
    with pytest.raises(RuntimeError, match="items: expected a store that stays as it is during iteration"):
        next(batches)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "uint16", "uint32", "uint64"])
def test_accumulate_in_dtypes_that_torch_does_not_add(tmp_path, dtype, on_disk):
    dtype = getattr(torch, dtype)
    store = mk.KeyValueStore(2, dtype=dtype, path=tmp_path / "s" if on_disk else None)
    values = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.float32).to(dtype)
    assert store.store([1, 2, 1], values, accumulate=True).tolist() == [0, 0, 3]
    assert store.get(1).float().tolist() == [6, 8] and store.get(2).float().tolist() == [3, 4]
    if dtype == torch.uint64:
        store.store([3, 3], torch.tensor([[2**63, 1], [7, 2**64 - 1]], dtype=dtype), accumulate=True)
        assert store.get(3).tolist() == [2**63 + 7, 0]
    store.close()


def test_a_write_that_fails_halfway_leaves_no_key_without_its_value(monkeypatch):
    store = mk.KeyValueStore()
    store.store([1], numbers([1]))

    def fail(rows):
        raise MemoryError

    monkeypatch.setattr(store._data.pool, "reserve", fail)
    with pytest.raises(MemoryError):
        store.store([1, 2, 3, 2], numbers([5, 6, 7, 8]))
    monkeypatch.undo()
    assert len(store) == 1 and store.get(1) == 1 and store.get(2) is None
    store.store([4, 5], numbers([4, 5]))
    assert store.retrieve([1, 2, 3, 4, 5])[0].tolist() == [1, 0, 0, 4, 5]


def test_a_store_says_how_to_copy_it():
    with pytest.raises(TypeError, match="cannot be pickled or copied: use state_dict, snapshot"):
        copy.deepcopy(mk.KeyValueStore())
    for shape in (2.5, None):
        with pytest.raises(TypeError, match="value_shape: expected a size or a sequence of sizes"):
            mk.KeyValueStore(shape)


@pytest.mark.parametrize("capacity", [None, 50])
def test_text_keys_that_come_and_go_take_no_more_memory(capacity):
    store = mk.KeyValueStore((), torch.int64, key_type="str", capacity=capacity, on_full="lru" if capacity else "grow")
    sizes, live = [], []
    for i in range(100):
        new = [f"a key of some bytes, {i * 40 + j}" for j in range(40)]
        store.store(new, torch.arange(i * 40, i * 40 + 40))
        if capacity is None:
            store.erase(live)
        live = new
        sizes.append(store.nbytes)
    values, found = store.retrieve(live)
    assert found.all() and values.tolist() == list(range(3960, 4000))
    assert sorted(key for keys, _ in store.items() for key in keys)[-1].startswith("a key of some bytes, 39")
    assert sizes[-1] <= 2 * sizes[5]


def test_verify_beside_a_rewrite_says_so(tmp_path):
    with saved(tmp_path / "s", [1]) as store, mk.KeyValueStore.open(tmp_path / "s") as reader:
        store.compact()
        with pytest.raises(StoreError, match="was rewritten: refresh first"):
            reader.verify()
        assert reader.get(1) == 1 and reader.refresh() and reader.verify().ok


def test_compact_does_not_hide_a_damage(tmp_path):
    saved(tmp_path / "s", [1, 2]).close()
    segment = tmp_path / "s" / "segment-00000001.mkv"
    data = bytearray(segment.read_bytes())
    data[4096] ^= 1
    segment.write_bytes(data)
    with mk.KeyValueStore.open(tmp_path / "s", mode="w") as store:
        with pytest.raises(StoreFormatError, match=r"is left as it is: .*wrong checksum"):
            store.compact()
        assert not store.verify().ok


def test_an_index_of_another_store_removes_nothing(tmp_path):
    saved(tmp_path / "s", range(3)).close()
    mk.KeyValueStore((), path=tmp_path / "empty").close()
    (index,) = (p for p in (tmp_path / "empty").glob("index-*") if p.suffix in (".lmdb", ".sqlite"))
    (tmp_path / "s" / index.name).write_bytes(index.read_bytes())
    for mode in ("r", "w"):
        with pytest.raises(StoreFormatError, match="another store"):
            mk.KeyValueStore.open(tmp_path / "s", mode=mode)
    assert list((tmp_path / "s").glob("segment-*"))
