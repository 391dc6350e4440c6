"""A store whose folder others move, remove, lock anew or may only read; kills that leave shared memory behind; a fork beside SQLite."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time

import pytest
from store_faults import fork, in_child, wait
from store_logs import ENGINES, contents, ints, new, put, stored

from memkernels.store import engine_sqlite
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
