"""What the log survives: kills, torn writes, disks that fail, files that were tampered with, other processes."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import sqlite3
import struct
import time

import pytest
from store_faults import CALLS, EngineFaults, Failing, check_recovered, fork, wait, writer
from store_logs import (
    ENGINES,
    ROW,
    contents,
    ints,
    needs_lmdb,
    new,
    put,
    stored,
    values,
)

from memkernels.store import disk, journal
from memkernels.store.format import HEADER
from memkernels.store.log import Log, StoreError, StoreFormatError


def killed_writers(path, engine, durability, seed, kills, at_calls):
    draw = random.Random(f"{seed} {engine} {durability}")
    new(path, engine, durability=durability, segment_bytes=HEADER + 400 * ROW).close()
    model = ({}, 0)
    for kill in range(kills):
        stop_at = draw.randrange(1, 250) if at_calls else None
        pid, pipe = fork(writer(path, seed, durability, model[0], stop_at))
        if stop_at is None:
            first = os.read(pipe, 8)
            if kill == kills - 1 and not model[1]:  # a slow machine: one commit at least
                first += os.read(pipe, 8)
            time.sleep(draw.random() ** 2 * (0.06 if durability == "commit" else 0.02))
            os.kill(pid, signal.SIGKILL)
        status, said = wait(pid, pipe)
        assert status == -signal.SIGKILL
        told = said if at_calls else first + said
        numbers = [n for (n,) in struct.iter_unpack("<q", told[: len(told) // 8 * 8])]
        last = numbers[-1] if numbers else model[1]
        model = check_recovered(path, seed, model, last, last + 1)
    assert model[1] > 0
    Log.open(path, "w").close()
    check_recovered(path, seed, model, model[1], model[1])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("durability", ["commit", "async", "none"])
def test_kill_at_random_moments(in_memory, engine, durability):
    killed_writers(in_memory / "s", engine, durability, 1, 5, False)
    killed_writers(in_memory / "t", engine, durability, 2, 5, True)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("durability", ["commit", "async", "none"])
def test_kill_a_thousand_times(in_memory, engine, durability):
    for seed in range(100, 120):
        killed_writers(in_memory / f"{seed}", engine, durability, seed, 10, seed % 2 == 0)


def three_commits(path, engine, big=False):
    """A log after three commits, of which the last is wholly in the journal (or, `big`, in the engine); and the states."""
    log, states = new(path, engine, segment_bytes=1 << 20), [{}]
    for commit in range(1, 4):
        if big and commit == 3:
            log._settle()
            log._journal.close(remove=True)
            log._journal = None
        put(log, range(commit * 3, commit * 3 + 5), commit)
        log.commit()
        states.append(states[-1] | dict.fromkeys(range(commit * 3, commit * 3 + 5), commit))
    return log, states


def crashed(path, log, to):
    """A copy of the files as they are, and the log put away without its tidying."""
    shutil.copytree(path, to)
    log._release()


def both_ways(path, work, expected):
    """What a reader sees first, and what a writer makes of it."""
    for mode in "rw":
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(path, work)
        with Log.open(work, mode) as log:
            assert contents(log) in expected, mode
            assert log.verify().ok
        assert stored(work) in expected


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", ENGINES)
def test_torn_tail_of_the_journal_and_of_segments(in_memory, engine, every):
    log, states = three_commits(in_memory / "s", engine)
    put(log, range(100, 110), 9)  # not committed
    size, draw = log._journal.size, random.Random(1)
    crashed(in_memory / "s", log, in_memory / "crash")
    path = in_memory / "crash" / journal.NAME
    whole = path.read_bytes()
    step_bytes = size // 3
    for at in sorted({*range(size - step_bytes - 3, size + 1, every), size - step_bytes, size - 1, size}):
        for junk in (bytes(len(whole) - at), b"", draw.randbytes(len(whole) - at)) if at % 5 == 0 else (bytes(len(whole) - at),):
            path.write_bytes(whole[:at] + junk)
            number = 3 if at == size else 2 if at >= size - step_bytes else 1
            with Log.open(in_memory / "crash") as log:
                assert contents(log) in ([states[number], states[3]] if at > size - 4 else [states[number]])
    path.write_bytes(whole)
    segment = in_memory / "crash" / "segment-00000001.mkv"
    data, used = segment.read_bytes(), 4096 + 15 * 32
    for cut in (*range(4096, used + 1, 7 * every), used, used + 100, len(data)):  # none of the rows was synced: the journal has them all
        for junk in (b"", draw.randbytes(500)) if cut % 3 == 0 else (b"",):
            segment.write_bytes(data[:cut] + junk)
            both_ways(in_memory / "crash", in_memory / "work", [states[3]])
    segment.unlink()
    both_ways(in_memory / "crash", in_memory / "work", [states[3]])


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", ENGINES)
def test_torn_tail_behind_committed_rows(in_memory, engine, every):
    log, states = three_commits(in_memory / "s", engine, big=True)
    put(log, range(100, 110), 9)
    crashed(in_memory / "s", log, in_memory / "crash")
    segment = in_memory / "crash" / "segment-00000001.mkv"
    data, used, draw = segment.read_bytes(), 4096 + 15 * 32, random.Random(2)
    for cut in range(used, used + 10 * 32, every):
        segment.write_bytes(data[:cut] + draw.randbytes(cut % 50))
        with Log.open(in_memory / "crash", "r" if cut % 8 else "w") as log:
            assert contents(log) == states[3]
    for cut in range(0, used, 29 * every):
        segment.write_bytes(data[:cut])
        with pytest.raises(StoreFormatError):
            Log.open(in_memory / "crash")


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", ENGINES)
def test_torn_last_write_of_the_engine(in_memory, engine, every):
    """The machine stops within a commit of the engine: its file as before, with the commit's writes there in part."""
    log, states = three_commits(in_memory / "s", engine, big=True)
    names = [n for n in os.listdir(in_memory / "s") if n.startswith("index") and not n.endswith(("-shm", "-lock"))]
    before = {name: (in_memory / "s" / name).read_bytes() for name in names}
    put(log, [1, 2], 4)
    log.commit()
    after = {name: (in_memory / "s" / name).read_bytes() for name in names}
    states.append(states[3] | {1: 4, 2: 4})
    crashed(in_memory / "s", log, in_memory / "crash")
    for path in (in_memory / "crash").glob("*-shm"):
        path.unlink()
    draw, changed = random.Random(3), [name for name in names if before[name] != after[name]]
    assert len(changed) == 1
    target, old, full = in_memory / "crash" / changed[0], before[changed[0]], after[changed[0]]
    size = max(len(old), len(full))
    old, full = old.ljust(size, b"\0"), full.ljust(size, b"\0")
    differs = [i for i in range(size) if old[i] != full[i]]
    seen = set()

    def look_at(data):
        target.write_bytes(data)
        with Log.open(in_memory / "crash") as log:
            found = contents(log)
            assert found in states[3:]
            seen.add(log.commit_number)

    if engine == "sqlite":  # appended frames, each with a checksum that covers those before
        for at in differs[:: max(1, len(differs) // (900 // every))]:
            look_at(full[: at + 1])
            if at % 5 == 0:
                look_at(full[: at + 1] + draw.randbytes(size - at - 1))
    else:  # pages that nothing reaches yet, in any order; then the meta page, byte by byte
        pages = sorted({i // 4096 for i in differs if i >= 8192})
        for _ in range(20 + 100 // every):
            data = bytearray(old)
            for page in pages:
                end = page * 4096 + draw.choice((0, 0, 512, 2048, 4096))
                data[page * 4096 : end] = draw.choice((full[page * 4096 : end], draw.randbytes(end - page * 4096)))
            look_at(bytes(data))
        for at in [i for i in differs if i < 8192]:
            look_at(full[: at + 1].ljust(8192, b"\0")[: at + 1] + old[at + 1 : 8192] + full[8192:])
    look_at(full)
    assert seen == {3, 4}


def script(path, engine):
    """Everything that writes: steps that take the log and give it, each with the state that it leaves."""
    one, two = dict.fromkeys(range(30), 1), dict.fromkeys(range(30), 1) | dict.fromkeys(range(25, 90), 2)
    three = {key: stamp for key, stamp in two.items() if key != 3} | {5: 3}

    def first(log):
        put(log, range(30), 1)
        log.commit()

    def second(log):
        put(log, range(25, 90), 2)
        log.commit()

    def third(log):
        put(log, [5], 3)
        log.forget(ints([3]))
        log.commit()

    def rewrite(log):
        log.rewrite([(ints([5]), values([4]))], erase=True)

    copy = path.with_name("copy")
    yield lambda log: new(path, engine), {}
    yield first, one
    yield second, two
    yield lambda log: log._settle(), two
    yield third, three
    yield rewrite, {5: 4}
    yield lambda log: log.snapshot(copy), {5: 4}
    yield lambda log: log.close(), {5: 4}


def run_until_failure(path, engine):
    """(log, states it may be in, the error or None) of the script."""
    log, before = None, {}
    for work, after in script(path, engine):
        try:
            log = work(log) or log
        except (OSError, StoreError) as error:
            return log, [before, after], error
        before = after
    return log, [before], None


def go_on(log, allowed, system):
    """One more commit after a failure: refused when a sync or a commit had failed, without another sync; else as ever."""
    failed, syncs = log._failed is not None, [name for name in system.after if "sync" in name]
    try:
        put(log, [7], 7)
        log.commit()
    except StoreError:
        assert failed
        assert [name for name in system.after if "sync" in name] == syncs
        log.close()
        return allowed, True
    assert not failed
    log.close()
    return [state | {7: 7} for state in allowed], False


@pytest.mark.parametrize(
    ("engine", "code"),
    [
        pytest.param("sqlite", errno.ENOSPC),
        pytest.param("lmdb", errno.EIO, marks=needs_lmdb),
        pytest.param("sqlite", errno.EIO, marks=pytest.mark.slow),
        pytest.param("lmdb", errno.ENOSPC, marks=[needs_lmdb, pytest.mark.slow]),
    ],
)
def test_every_call_that_can_fail(in_memory, engine, code, monkeypatch):
    counting, refused = Failing(), 0
    monkeypatch.setattr(disk, "system", counting)
    assert run_until_failure(in_memory / "0" / "s", engine)[2] is None
    assert len(counting.made) > 60 and set(counting.made) == set(CALLS)
    for n in range(1, len(counting.made) + 1):
        path, system = in_memory / str(n) / "s", Failing(n, code)
        disk.system = system
        log, allowed, error = run_until_failure(path, engine)
        assert error is not None or system.failed == "ftruncate", (n, system.failed)  # giving back room at the end may fail unseen
        if log is not None and not log.closed:
            allowed, poisoned = go_on(log, allowed, system)
            refused += poisoned
        disk.system = os
        if not Log.exists(path):
            assert allowed[0] == {}
            new(path, engine).close()
        found = stored(path)
        assert found in allowed, (n, system.failed, error)
        with Log.open(path, "w") as again:
            assert contents(again) == found
        shutil.rmtree(in_memory / str(n))
    assert refused > 5


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("there", [False, True])
def test_a_creation_that_fails_leaves_nothing(in_memory, engine, there, monkeypatch):
    source = new(in_memory / "source", engine)
    put(source, [1], 1)
    source.commit()
    source.verify()  # takes the commit out of the journal
    for make in (lambda path: new(path, engine), source.snapshot):
        for n in range(1, 100):
            path = in_memory / "new"
            if there:
                path.mkdir()
            monkeypatch.setattr(disk, "system", Failing(n, errno.ENOSPC))
            try:
                made = make(path)
            except OSError:
                assert path.exists() == there or Log.exists(path)
                assert Log.exists(path) or not there or set(os.listdir(path)) <= {"LOCK", "READERS"}
                shutil.rmtree(path, ignore_errors=True)
                continue
            finally:
                disk.system = os
            if made is not None:
                made.close()
            assert n > 5 and stored(path) == ({} if made is not None else {1: 1})
            shutil.rmtree(path)
            break
    source.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_log_whose_writing_failed_is_not_called_damaged(in_memory, engine, monkeypatch):
    log = new(in_memory / "s", engine)
    put(log, [1], 1)
    log.commit()  # to the journal
    monkeypatch.setattr(disk, "system", Failing(1, errno.ENOSPC))
    with pytest.raises(OSError):
        log.verify()
    disk.system = os
    for look in (log.verify, lambda: log.snapshot(in_memory / "copy")):
        with pytest.raises(StoreError, match=r"writing failed.*open it again") as stop:
            look()
        assert not isinstance(stop.value, StoreFormatError)
    log.close()
    assert stored(in_memory / "s") == {1: 1}


def engine_errors(engine):
    """What the engine's own library raises when the disk fails, is full, or somebody else holds the file."""
    if engine == "sqlite":
        return [sqlite3.OperationalError(text) for text in ("disk I/O error", "database or disk is full", "database is locked")]
    import lmdb

    texts = ("mdb_txn_commit: Input/output error", "mdb_txn_commit: No space left on device")
    return [lmdb.MapFullError("mdb_put: MDB_MAP_FULL: Environment mapsize limit reached"), *map(lmdb.Error, texts)]


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_call_of_the_engine_that_can_fail(in_memory, engine, every, monkeypatch):
    """A clear error, nothing acknowledged is lost, no commit is there in part, the log refuses to go on or can, and it opens again."""
    counting, refused, told = EngineFaults(), 0, set()
    counting.install(monkeypatch)
    assert run_until_failure(in_memory / "0" / "s", engine)[2] is None
    assert len(counting.made) > 30
    cases = [(n, how) for n, name in enumerate(counting.made, 1) for how in range(3 if name in ("commit", "COMMIT") else 1)]
    for case, (n, how) in enumerate(cases):
        for error in engine_errors(engine) if every == 1 or how else [engine_errors(engine)[n % 3]]:
            if case % every and counting.made[n - 1] not in ("commit", "COMMIT"):
                continue
            path, faults = in_memory / str(n) / "s", EngineFaults(n, error, how)
            faults.install(monkeypatch)
            log, allowed, seen = run_until_failure(path, engine)
            where = (n, faults.failed, how, error, seen)
            if faults.failed != "ROLLBACK":  # of a reading: nothing depends on it
                assert isinstance(seen, StoreError) and str(error) in str(seen), where
            if log is not None and not log.closed:
                allowed, poisoned = go_on(log, allowed, faults)
                refused += poisoned
            told.add(faults.failed)
            monkeypatch.undo()
            if not Log.exists(path):
                assert allowed[0] == {}, where
                new(path, engine).close()
            found = stored(path)
            assert found in allowed, where
            with Log.open(path, "w") as again:
                assert contents(again) == found, where
                put(again, [7], 7)
                again.commit()
            assert stored(path) == found | {7: 7}
            shutil.rmtree(in_memory / str(n))
    assert refused > 2 and len(told) > 5


def test_a_failed_sync_is_not_tried_again(in_memory, monkeypatch):
    log = new(in_memory / "s")
    put(log, [1], 1)
    log.commit()
    system = Failing(1, errno.EIO, ("fdatasync", "fsync"))
    monkeypatch.setattr(disk, "system", system)
    put(log, [2], 2)
    with pytest.raises(OSError, match="Input/output"):
        log.commit()
    for call in (log.commit, lambda: put(log, [3], 3), log.rollback, lambda: log.rewrite([])):
        with pytest.raises(StoreError, match="open it again"):
            call()
    log.close()
    assert system.made == ["fdatasync"]
    assert stored(in_memory / "s") in ({1: 1}, {1: 1, 2: 2})


def test_an_error_in_the_background_is_told_at_the_next_call(in_memory, monkeypatch):
    log = new(in_memory / "s", durability="async")
    put(log, [1], 1)
    log.commit()
    log.wait()
    monkeypatch.setattr(disk, "system", Failing(1, errno.EIO, ("fdatasync",)))
    put(log, [2], 2)
    assert log.commit() == 2
    with pytest.raises(StoreError, match="Input/output"):
        log.wait()
    with pytest.raises(StoreError, match="Input/output"):
        log.commit()
    with pytest.raises(StoreError, match="Input/output"):
        log.close()
    assert stored(in_memory / "s") == {1: 1}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", [0, 1])
def test_a_failed_commit_of_the_engine_in_the_background(in_memory, engine, how, monkeypatch):
    log = new(in_memory / "s", engine, durability="async")
    put(log, [1], 1)
    log.commit()
    log.close()
    faults = EngineFaults(2, engine_errors(engine)[1], how, ("commit", "COMMIT"))  # the first one is that of the opening
    faults.install(monkeypatch)
    log = Log.open(in_memory / "s", "w", durability="async")
    put(log, [2], 2)
    log.commit()
    for call in (log.wait, log.commit, log.close):
        with pytest.raises(StoreError, match=str(faults.error)):
            call()
    monkeypatch.undo()
    assert stored(in_memory / "s") == {1: 1} | ({2: 2} if how else {})
