"""Files of the store that were damaged or made up, and a store that several processes have open."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import sqlite3
import struct
import time
import tracemalloc

import pytest
from store_faults import fork, in_child, wait
from store_logs import (
    ENGINES,
    SMALL,
    apply,
    contents,
    ints,
    look,
    needs_lmdb,
    new,
    put,
    stored,
    texts,
    values,
)

from memkernels.store import journal, runs
from memkernels.store.crc32c import crc32c
from memkernels.store.format import HEADER, Marker, Schema, SegmentHeader, State
from memkernels.store.log import Log, StoreError, StoreFormatError

FEW, MANY = 4000, 200_000


def mutate(draw, data):
    """A damaged copy; half of them with a right checksum at the end, as one made on purpose has."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at, kind = draw.randrange(len(out) + 1), draw.randrange(7)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            out[at:at] = draw.randbytes(draw.choice((1, 4, 8, 100)))
        elif kind == 3:
            out[at : at + 8] = struct.pack("<Q", draw.choice((0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, draw.randrange(300))))
        elif kind == 4:
            out[at : at + 4] = struct.pack("<I", draw.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, draw.randrange(300))))
        elif kind == 5:
            del out[at : at + draw.choice((1, 4, 8, 16))]
        elif len(out) > 20:
            to = draw.randrange(len(out) - 8)
            out[to : to + 8] = out[max(0, at - 8) : at]
        out = out or bytearray(1)
    if draw.random() < 0.5 and len(out) > 4:
        out[-4:] = struct.pack("<I", crc32c(out[:-4]))
    return bytes(out)


def parsers(path):
    """Good records and what reads them; a reader may also find nothing wrong with a mutant."""
    state, log = State(5, 0, 30, 40, 1, b"0123456789abcdef"), new(path)
    put(log, range(3), 1)
    log.commit()
    put(log, [1], 2)
    log.commit()
    record = (path / journal.NAME).read_bytes()[: log._journal.size]
    base, schema = log._catalog.state, log.schema
    log.close()

    def of_run(kind):
        def parse(data):
            run = runs.decode("run", data, kind)
            runs.check_rows("run", run, 30)
            for keys, rows in runs.batches("run", run):
                assert len(keys) == len(rows) and -1 <= int(rows.min()) and int(rows.max()) < 30

        return parse

    def of_journal(data):
        (path / journal.NAME).write_bytes(data)
        found, _ = journal.read(path, schema, 32, base)
        for one in found:
            journal.blocks(one, 32)

    yield Marker("sqlite", 1).encode(), Marker.decode
    yield state.encode(), State.decode
    yield Schema("str", SMALL.columns, {"capacity": [1, {"a": None}]}).to_json(), Schema.from_json
    yield SegmentHeader(b"0123456789abcdef", 1, 0, 0, 32).encode(), lambda data: SegmentHeader.decode("segment", data)
    for kind, keys in (
        ("int64", ints(range(10))),
        ("str", texts("str", ["a", "", "é", "apple"])),
        ("bytes", texts("bytes", [b"\xff", b""])),
    ):
        run = runs.Run(kind, 0, first_commit=2, last_commit=2, blocks=[(10, 77), (3, 1)])
        run.add(keys, 3)
        run.add(keys, runs.ERASED)
        yield run.encode(), of_run(kind)
    yield record, of_journal


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_mutants_of_every_record(in_memory, count):
    draw, refused, largest = random.Random(count), 0, 0
    all_parsers = list(parsers(in_memory / "s"))
    for data, parse in all_parsers:
        parse(data)
        tracemalloc.start()
        for i in range(count // len(all_parsers)):
            mutant = mutate(draw, data)
            if i % 16 == 0:
                tracemalloc.reset_peak()
                before = tracemalloc.get_traced_memory()[0]
            try:
                parse(mutant)
            except StoreFormatError:
                refused += 1
            if i % 16 == 0:
                largest = max(largest, tracemalloc.get_traced_memory()[1] - before - len(mutant))
        tracemalloc.stop()
    assert refused > count / 2
    assert largest < 1 << 20


def test_deep_or_huge_json_is_refused():
    for text in (
        b"[" * 100_000,
        b'{"key_type": "int64", "columns": [["a", [%s], "int8"]], "extra": {}}' % (b"9" * 5000),
        b"\xff",
        b"7",
        b"{}",
    ):
        with pytest.raises(StoreFormatError):
            Schema.from_json(text + struct.pack("<I", crc32c(text)))


def examine(path, engine):
    """What a mutated store does: opened, replayed, every row read, verified, written to."""
    outcomes = 0
    for mode in "rw":
        try:
            with Log.open(path, mode) as log:
                contents(log)
                log.verify()
                if mode == "w":
                    put(log, range(50), 9)
                    log.commit()
                    log._settle()
        except StoreFormatError:
            outcomes += 1
        except (StoreError, AssertionError):  # rows that were changed in place; an engine that can say no more than that it failed
            outcomes += 1
    return outcomes


def mutants_of_files(in_memory, engine, count):
    path, draw = in_memory / "s", random.Random(f"{engine} {count}")
    log = new(path, engine)
    for i in range(30):
        put(log, range(i, i + 1 + 50 * (i % 3)), i)
        log.commit()
        if i % 2:
            log._settle()
    shutil.copytree(path, in_memory / "good")
    log._release()
    names = sorted(n for n in os.listdir(in_memory / "good") if n not in ("LOCK", "READERS"))
    main = [n for n in names if n.endswith((engine, "-wal"))]

    def work():
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        refused = 0
        for _ in range(count):
            shutil.rmtree(in_memory / "work", ignore_errors=True)
            shutil.copytree(in_memory / "good", in_memory / "work")
            target = in_memory / "work" / draw.choice(names + 3 * main)
            data = target.read_bytes()
            if draw.random() < 0.5 and len(data) > 8192:  # where the structure is
                page = 4096 * draw.randrange(len(data) // 4096)
                data = data[:page] + mutate(draw, data[page : page + 4096])[:4096].ljust(4096, b"\0") + data[page + 4096 :]
            else:
                data = mutate(draw, data)
            target.write_bytes(data)
            refused += examine(in_memory / "work", engine) > 0
        return refused

    return int(in_child(work))


@pytest.mark.parametrize("engine", ENGINES)
def test_mutants_of_files_are_refused_or_harmless(in_memory, engine):
    assert mutants_of_files(in_memory, engine, 40) > 8


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_many_mutants_of_files(in_memory, engine):
    assert mutants_of_files(in_memory, engine, 2000) > 500


def test_tables_that_are_not_ours_are_refused(in_memory):
    for statement in ("CREATE TRIGGER t AFTER INSERT ON map BEGIN SELECT 1; END", "CREATE VIEW v AS SELECT 1", "DROP TABLE map"):
        shutil.rmtree(in_memory / "s", ignore_errors=True)
        new(in_memory / "s").close()
        connection = sqlite3.connect(in_memory / "s" / "index-00000001.sqlite")
        connection.execute(statement)
        connection.commit()
        connection.close()
        with pytest.raises(StoreFormatError, match="tables"):
            Log.open(in_memory / "s")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_flipped_bit_anywhere_is_found(in_memory, engine):
    log = new(in_memory / "s", engine)
    put(log, range(100), 1)
    log.commit()
    log.close()
    draw, row = random.Random(1), 32
    for _ in range(60):
        at = draw.randrange(100)
        path = in_memory / "s" / f"segment-{at // 40 + 1:08d}.mkv"
        offset = draw.randrange(HEADER) if draw.random() < 0.1 else HEADER + at % 40 * row + draw.randrange(row)
        data = bytearray(path.read_bytes())
        data[offset] ^= 1 << draw.randrange(8)
        whole = path.read_bytes()
        path.write_bytes(data)
        if offset >= HEADER:
            with Log.open(in_memory / "s") as log:
                report = log.verify()
                assert not report.ok and path.name in report.problems[0]
                with pytest.raises(StoreFormatError, match="checksum"):
                    log.snapshot(in_memory / "copy")
                assert not (in_memory / "copy").exists()
        else:
            with pytest.raises(StoreFormatError):
                Log.open(in_memory / "s")
        path.write_bytes(whole)
    assert stored(in_memory / "s") == dict.fromkeys(range(100), 1)


@needs_lmdb
def test_the_lock_file_of_lmdb_has_no_holes(in_memory, monkeypatch):
    """LMDB writes it through a mapping: on a full disk a hole in it was the end of the process (SIGBUS)."""
    new(in_memory / "s", "lmdb").close()
    (lock,) = (in_memory / "s").glob("*-lock")
    assert lock.stat().st_blocks * 512 >= lock.stat().st_size == 8192

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left.*-lock"):
        new(in_memory / "t", "lmdb")
    assert not (in_memory / "t").exists()
    lock.unlink()
    with pytest.raises(OSError, match=r"No space left.*-lock"):
        Log.open(in_memory / "s")
    monkeypatch.undo()
    assert stored(in_memory / "s") == {}


@needs_lmdb
def test_a_flipped_bit_in_the_number_of_the_newest_commit(in_memory):
    """LMDB would take the commit before for the newest; only a bit that makes both numbers follow each other again is not found."""
    log = new(in_memory / "s", "lmdb", durability="none")
    for stamp in range(8):
        put(log, range(20), stamp)
        log.commit()
    log.close()
    path = next((in_memory / "s").glob("*.lmdb"))
    whole = path.read_bytes()
    numbers = [struct.unpack_from("<Q", whole, page + 144)[0] for page in (0, 4096)]
    assert abs(numbers[0] - numbers[1]) == 1 and max(numbers) > 7
    at, newest = (0, 4096)[numbers.index(max(numbers))] + 144, max(numbers)
    unseen = 0
    for bit in range(48):
        changed = newest ^ 1 << bit
        path.write_bytes(whole[:at] + struct.pack("<Q", changed) + whole[at + 8 :])
        if abs(changed - min(numbers)) == 1:
            unseen += 1
            continue
        with pytest.raises(StoreFormatError, match="meta pages"):
            Log.open(in_memory / "s")
    assert unseen <= 1


def test_a_newer_format_version_is_named(in_memory, monkeypatch):
    def newer(data, at, size=4):
        out = bytearray(data)
        out[at : at + size] = (2).to_bytes(size, "little")
        out[-4:] = struct.pack("<I", crc32c(out[:-4]))
        return bytes(out)

    run = runs.Run("int64")
    run.add(ints([1]), 0)
    state = State(1, 0, 1, 40, 1, bytes(16))
    for call in (
        lambda: State.decode(newer(state.encode(), 4)),
        lambda: SegmentHeader.decode("segment", newer(SegmentHeader(bytes(16), 1, 0, 0, 32).encode(), 8)),
        lambda: runs.decode("run", newer(run.encode(), 4, 2), "int64"),
        lambda: Marker.decode(b"memkernels-store 2 whatever comes then\n"),
    ):
        with pytest.raises(StoreFormatError, match="format version 2; this memkernels reads up to 1"):
            call()
    new(in_memory / "s").close()
    (in_memory / "s" / "ENGINE").write_bytes(b"memkernels-store 2 paged 1\n")
    with pytest.raises(StoreFormatError, match="use a newer one"):
        Log.open(in_memory / "s", "w")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_second_writer_is_told_who_the_first_is(in_memory, engine):
    with new(in_memory / "s", engine) as log:
        with pytest.raises(StoreError, match=f"process {os.getpid()}"):
            Log.open(in_memory / "s", "w")

        def second():
            with pytest.raises(StoreError, match=f"by process {os.getppid()}; a store has one writer"):
                Log.open(in_memory / "s", "w")
            return stored(in_memory / "s")

        put(log, [1], 1)
        log.commit()
        assert in_child(second) == "{1: 1}"
    Log.open(in_memory / "s", "w").close()


@pytest.mark.parametrize("engine", ENGINES)
def test_readers_in_other_processes_see_whole_commits(in_memory, engine):
    """Every commit gives all keys the same stamp: a reader must never see two stamps, and always the newest acknowledged one."""
    path = in_memory / "s"
    log = new(path, engine, segment_bytes=HEADER + 500 * 32)
    put(log, range(20), 0)
    log.commit()

    def reader(into):
        with Log.open(path) as view:
            rows, seen, until = apply({}, view.replay()), set(), time.monotonic() + 0.7
            while (now := time.monotonic()) < until or (len(seen) < 6 and now < until + 200):  # longer on a busy machine
                changes = view.refresh()
                rows = apply({} if changes.restart else rows, changes)
                found = look(view, rows)
                assert len(found) == 20 and len(set(found.values())) == 1
                assert min(found.values()) >= max([*seen, 0])
                seen |= set(found.values())
            os.write(into, struct.pack("<q", len(seen)))

    children = [fork(reader) for _ in range(2)]
    for stamp in range(1, 100_000):
        put(log, range(20), stamp)
        log.commit()
        if stamp % 40 == 0:
            log.rewrite([(ints(range(20)), values([stamp] * 20))])
        if stamp % 10 == 0 and all(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid, _ in children):
            break
    for pid, pipe in children:
        status, said = wait(pid, pipe)
        assert status == 0 and struct.unpack("<q", said)[0] > 5
    log.close()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("durability", ["commit", "async"])
def test_fork(in_memory, engine, durability):
    log = new(in_memory / "s", engine, durability=durability)
    put(log, range(50), 1)
    log.commit()
    log.wait()
    reader = Log.open(in_memory / "s")

    def child():
        for call in (lambda: put(log, [1], 2), log.commit, log.rollback, lambda: log.rewrite([])):
            with pytest.raises(StoreError, match=r"its child \d+ may only read"):
                call()
        assert contents(log) == contents(reader) == dict.fromkeys(range(50), 1)
        log.close()
        return contents(reader)

    assert in_child(child) == repr(dict.fromkeys(range(50), 1))
    out, into = os.pipe()

    def outlives(pipe):
        os.close(into)
        os.read(out, 1)

    pid, pipe = fork(outlives)
    put(log, [1], 2)
    log.commit()
    log.close()
    with Log.open(in_memory / "s", "w") as log:  # the child of the first writer holds no lock
        put(log, [2], 3)
        log.commit()
        rows = apply({}, reader.replay())
        assert look(reader, rows) == dict.fromkeys(range(50), 1) | {1: 2, 2: 3}
    os.close(into)
    os.close(out)
    assert wait(pid, pipe)[0] == 0
    reader.close()
