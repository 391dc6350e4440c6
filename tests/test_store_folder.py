"""A store whose folder others move, remove, lock anew or may only read; kills that leave shared memory behind; forks."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time

import pytest
import torch
from store_faults import fork, in_child, wait
from store_logs import ENGINES, contents, ints, new, put, stored

from memkernels.store import KeyValueStore, engine_sqlite
from memkernels.store.log import Log, StoreError


def committed(path, engine):
    """A store of three keys, open to write."""
    log = new(path, engine)
    put(log, range(3), 1)
    log.commit()
    return log


@pytest.mark.parametrize("engine", ENGINES)
def test_a_writer_whose_lock_has_gone_writes_no_more(in_memory, engine):
    path = in_memory / "s"
    log = committed(path, engine)
    (path / "LOCK").unlink()
    with Log.open(path, "w") as other:
        put(other, range(5), 2)
        other.commit()
        for call in (lambda: put(log, [9], 9), lambda: log.forget(ints([1])), log.commit, lambda: log.rewrite([]), log._settle):
            with pytest.raises(StoreError, match="was moved or removed"):
                call()
        with pytest.raises(StoreError, match="was moved or removed"):
            log.close()  # the first commit waits in the journal
        assert log.closed
        put(other, range(2), 3)
        other.commit()
    assert stored(path) == dict.fromkeys(range(2), 3) | dict.fromkeys(range(2, 5), 2)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_store_that_is_removed_or_moved_takes_no_commit(in_memory, engine):
    path = in_memory / "s"
    log = committed(path, engine)
    put(log, range(3), 2)
    path.rename(in_memory / "moved")
    with pytest.raises(StoreError, match="was moved or removed"):
        log.commit()
    (in_memory / "moved").rename(path)
    log.commit()
    log.close()
    assert stored(path) == dict.fromkeys(range(3), 2)
    log = Log.open(path, "w")
    shutil.rmtree(path)
    with pytest.raises(StoreError, match="was moved or removed"):
        put(log, [1], 3)
    log.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_path_that_is_no_text(in_memory, engine):
    path = in_memory / os.fsdecode(b"caf\xe9 \xff?#%20")
    with new(path, engine) as log:
        put(log, range(3), 1)
        log.commit()
    assert stored(path) == dict.fromkeys(range(3), 1)


def test_another_user_reads_what_the_write_ahead_log_holds(in_memory, monkeypatch):
    """SQLite in a folder that only its writer may write to: killed with commits in the write-ahead log, then at work, then done."""
    path = in_memory / "s"
    new(path, "sqlite", durability="none").close()

    def killed(pipe):
        log = Log.open(path, "w", durability="none")
        put(log, range(3), 1)
        log.commit()
        os._exit(0)

    assert wait(*fork(killed))[0] == 0
    monkeypatch.setattr(engine_sqlite.os, "access", lambda *_: False)
    assert stored(path) == dict.fromkeys(range(3), 1)
    with Log.open(path) as reader:
        monkeypatch.undo()
        with Log.open(path, "w", durability="none") as log:
            put(log, range(3), 2)
            log.commit()
            monkeypatch.setattr(engine_sqlite.os, "access", lambda *_: False)
            reader.refresh()
            assert reader.commit_number == 2
            monkeypatch.undo()
    monkeypatch.setattr(engine_sqlite.os, "access", lambda *_: False)
    assert stored(path) == dict.fromkeys(range(3), 2)


def test_a_fork_waits_for_calls_of_sqlite(in_memory):
    """A lock inside SQLite that another thread holds at the fork is never free in the child."""
    begun, left = threading.Event(), []

    def busy():
        with engine_sqlite._errors(in_memory):
            begun.set()
            time.sleep(0.3)
            left.append(time.monotonic())

    thread = threading.Thread(target=busy)
    thread.start()
    begun.wait()
    said = in_child(lambda: [*left, engine_sqlite._calls])
    thread.join()
    assert said == repr([*left, 0])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("goes_on", [False, True])
def test_a_commit_that_only_the_file_names(in_memory, engine, goes_on):
    """A writer killed between file and shared memory, while a reader keeps that memory; then another writer; then all are killed."""
    path = in_memory / "s"
    with new(path, engine) as log:
        put(log, range(3), 1)
        log.commit()
    table = path / {"sqlite": "index-00000001.sqlite-shm", "lmdb": "index-00000001.lmdb-lock"}[engine]

    def reader(pipe):
        with Log.open(path) as log:
            dict(contents(log))
            os.write(pipe, b"1")
            time.sleep(600)

    def killed(pipe):
        log = Log.open(path, "w", durability="none")
        before = table.read_bytes()
        put(log, range(20), 2)
        log.commit()
        with open(table, "r+b") as file:
            size = 1 << 15 if engine == "sqlite" else 56  # of LMDB: up to the number of its newest transaction
            file.write(before[:size])
        os._exit(0)

    def next_writer(pipe):
        log = Log.open(path, "w")
        assert contents(log) == dict.fromkeys(range(3), 1)
        if goes_on:
            put(log, range(5), 3)
            log.commit()
            os._exit(0)
        log.close()

    pid, pipe = fork(reader)
    try:
        assert os.read(pipe, 1) == b"1"
        assert wait(*fork(killed))[0] == 0
        assert wait(*fork(next_writer))[0] == 0
    finally:
        os.kill(pid, signal.SIGKILL)
        wait(pid, pipe)
    with Log.open(path) as log:
        assert contents(log) == (dict.fromkeys(range(5), 3) if goes_on else dict.fromkeys(range(3), 1))
        assert log.verify().ok


@pytest.mark.parametrize("count", [10, 60_000])
def test_a_child_has_none_of_the_threads_of_torch(in_memory, count):
    """Its own ops would wait there for ever, with more than one thread; those of a store end."""
    keys, values = [f"key{i}" for i in range(count)], torch.arange(count * 3).view(count, 3)
    twice, thrice = 2 * values, 3 * values  # before the fork: these, too, are ops of torch
    numbers, rows = torch.arange(2 * count), torch.arange(6 * count).view(-1, 3)
    store = KeyValueStore(3, torch.int64, key_type="str")
    store.store(keys, values)
    with KeyValueStore(3, torch.int64, key_type="str", path=in_memory / "s") as disk:
        disk.store(keys, values)
        disk.commit()

    def same(store, expected):
        got, found = store.retrieve(keys)
        assert bytes(found.numpy()) == b"\1" * count and bytes(got.numpy()) == bytes(expected.numpy())
        assert sum(len(part) for part, _ in store.items()) == count

    def child():
        signal.alarm(60)
        torch.set_num_threads(3)
        same(store, values)
        store.store(keys, values, accumulate=True)
        state = store.state_dict()
        store.erase(keys[::2])
        store.load_state_dict(state)
        store.compact()
        same(store, twice)
        with KeyValueStore.open(in_memory / "s", "w", verify="open") as disk:
            disk.store(keys, thrice)
            disk.commit()
            disk.compact(erase=True)
            same(disk, thrice)
        other = KeyValueStore(3, torch.int64, on_full="lru", capacity=count)
        other.store(numbers, rows)
        return torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(1 << 20).add_(1)  # starts them
        assert in_child(child) == "3"
    finally:
        torch.set_num_threads(before)
