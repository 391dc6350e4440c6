"""The log of the store: what goes in comes out, across segments, commits, processes and rewrites."""

from __future__ import annotations

import ast
import os
import random
from pathlib import Path

import pytest
import torch
from store_logs import (
    ENGINES,
    SMALL,
    apply,
    contents,
    ints,
    keys_of,
    look,
    new,
    put,
    stored,
    texts,
    values,
)

import memkernels
from memkernels.store import catalog, crc32c, disk, folder, journal, runs, tail
from memkernels.store import format as store_format
from memkernels.store.log import KeyBatch, Log, Schema, StoreError, StoreFormatError

PACKAGE = Path(memkernels.__file__).parent


def test_checksum_is_crc32c_on_every_path():
    compiled, data = crc32c._best(), random.Random(1).randbytes(13000)
    assert crc32c.crc32c(b"123456789") == crc32c.by_table(b"123456789") == 0xE3069283
    levels = ["auto"]
    if compiled is not crc32c.by_table:
        from memkernels import _C

        levels = [*_C.supported_levels(), "auto"]
    for level in levels:
        if len(levels) > 1:
            _C.set_cpu_level(level)
        for n in (0, 1, 7, 8, 9, 255, 767, 768, 777, 12287, 12288, 13000):
            assert compiled(data[:n], 99) == crc32c.by_table(data[:n], 99), (level, n)
            assert crc32c.combine(compiled(data[n:]), compiled(data[:n]), n) == compiled(data[n:] + data[:n])
    assert crc32c.crc32c(memoryview(bytearray(data))[3:77]) == crc32c.by_table(data[3:77])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("durability", ["commit", "async", "none"])
def test_random_commits_against_a_dict(in_memory, engine, durability):
    draw, model, committed = random.Random(engine + durability), {}, {}
    path = in_memory / "s"
    log, reader, rows = new(path, engine, durability=durability), None, {}
    for step in range(150):
        what = draw.random()
        keys = [draw.randrange(-40, 40) * 2**56 for _ in range(draw.choice((1, 1, 2, 7, 60)))]
        if what < 0.5:
            given = put(log, keys, step)
            assert given.dtype == torch.int64 and given.tolist() == list(range(log.rows - len(keys), log.rows))
            model |= dict.fromkeys(keys, step)
        elif what < 0.6:
            log.forget(ints(keys))
            model = {key: stamp for key, stamp in model.items() if key not in keys}
        elif what < 0.9:
            before = log.commit_number
            assert log.commit() >= before
            committed = dict(model)
        elif what < 0.94:
            log.rollback()
            model = dict(committed)
        elif what < 0.96 and model == committed:
            log.rewrite(iter([(ints(model), values(model.values()))]))
        elif what < 0.98:
            if model != committed:
                log.rollback()
                model = dict(committed)
            log.close()
            log = Log.open(path, "w", durability=durability)
        log.wait()
        if reader is None:
            reader = Log.open(path)
            rows = apply({}, reader.replay())
        elif step % 3 == 0:
            changes = reader.refresh()
            rows = apply({} if changes.restart else rows, changes)
            assert look(reader, rows) == committed
            assert reader.commit_number == log.commit_number
    log.rollback()
    assert contents(log) == committed
    assert log.verify().ok and reader.verify().ok
    reader.close()
    log.close()
    assert stored(path) == committed


DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.uint8, torch.bool, torch.int16, torch.float8_e4m3fn]


@pytest.mark.parametrize("engine", ENGINES)
def test_columns_of_any_shape_and_type(in_memory, engine):
    columns = {f"c{i}": (shape, dtype) for i, dtype in enumerate(DTYPES) for shape in [((), (3,), (2, 5), (0,), (1, 1, 7))[i % 5]]}
    schema = Schema("int64", columns, {"on_full": "grow", "note": "ü"})
    n, given = 50, {}
    for name, (shape, dtype) in columns.items():
        raw = torch.randint(0, 2, (n, *shape, 16)) if dtype == torch.bool else torch.randint(-9, 9, (n, *shape, 16))
        given[name] = raw.to(dtype)[..., 3]  # strided
    with Log.create(in_memory / "s", schema, engine=engine, segment_bytes=6000) as log:
        for low in range(0, n, 20):
            log.append(ints(range(low, min(n, low + 20))), {name: value[low : low + 20] for name, value in given.items()})
        log.commit()
    with Log.open(in_memory / "s") as log:
        assert log.schema == schema
        assert log.verify().ok
        for name, value in given.items():
            found = torch.cat(
                [chunk.columns[name].view(torch.uint8) if value.dim() == 0 else chunk.columns[name] for chunk in log.chunks()]
            )
            assert torch.equal(
                found[:n].float() if not value.is_complex() else found[:n], value.float() if not value.is_complex() else value
            )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["bytes", "str"])
def test_keys_of_bytes_and_text(in_memory, engine, kind, monkeypatch):
    monkeypatch.setattr(runs, "PIECE", 300)
    monkeypatch.setattr(runs, "BATCH", 7)
    words = ["", "apple", "ä" * 20, "naïve", "日本", "x" * 500, *(f"key {i}" for i in range(40))]
    keys = [word if kind == "str" else word.encode() + b"\xff\0" for word in words]
    with Log.create(in_memory / "s", Schema(kind, SMALL.columns), engine=engine) as log:
        log.append(texts(kind, keys), values(range(len(keys))))
        log.forget(texts(kind, keys[3:5]))
        log.append(texts(kind, keys[:2]), values([100, 101]))
        log.commit()
        log.append(texts(kind, []), values([]))
        log.commit()
    expected = {key: i for i, key in enumerate(keys)} | {keys[0]: 100, keys[1]: 101}
    for key in keys[3:5]:
        del expected[key]
    assert stored(in_memory / "s") == expected


def test_text_that_is_no_text_is_refused(in_memory):
    bad = KeyBatch("str", data=torch.tensor([0xC3, 0xA4], dtype=torch.uint8), offsets=torch.tensor([0, 1, 2]))
    with Log.create(in_memory / "s", Schema("str", SMALL.columns), engine="sqlite") as log:
        log.append(bad, values([1, 2]))
        log.commit()
        with pytest.raises(StoreFormatError, match="inside a character"):
            list(log.replay())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_large_commit_goes_into_pieces_and_small_ones_are_joined(in_memory, engine, monkeypatch):
    for module in (runs, tail, catalog):
        monkeypatch.setattr(module, "PIECE", 1 << 10)
    with new(in_memory / "s", engine) as log:
        put(log, range(800), 1)
        log.commit()
        assert log.verify().runs == 7
    with Log.open(in_memory / "s", "w") as log:
        for i in range(100):
            put(log, [i], 2)
            log.commit()
            if i % 3 == 0:
                log._settle()
        assert log.verify().runs < 7 + 2 * 8
    assert stored(in_memory / "s") == dict.fromkeys(range(800), 1) | dict.fromkeys(range(100), 2)


def test_small_commits_wait_in_the_journal_and_readers_see_them(in_memory, monkeypatch):
    monkeypatch.setattr(journal, "SIZE", 3000)
    log = new(in_memory / "s")
    put(log, [1], 1)
    log.commit()
    reader, engine_commits = Log.open(in_memory / "s"), set()
    rows = apply({}, reader.replay())
    for i in range(60):
        put(log, [i, i + 1], i)
        log.commit()
        engine_commits.add(log._catalog.state.commit)
        apply(rows, reader.refresh())
        assert reader.commit_number == log.commit_number == i + 2
        assert look(reader, rows) == {1: 1} | {k: min(k, i) for k in range(i + 2)}
        assert reader.verify().rows == 2 * i + 3
    assert 3 < len(engine_commits) < 30
    reader.snapshot(in_memory / "copy")
    assert stored(in_memory / "copy") == look(reader, rows)
    log._release()  # as a crash leaves it
    assert (in_memory / "s" / journal.NAME).exists()
    assert stored(in_memory / "s") == look(reader, rows)
    Log.open(in_memory / "s", "w").close()
    assert not (in_memory / "s" / journal.NAME).exists()
    assert stored(in_memory / "s") == look(reader, rows)


@pytest.mark.parametrize("engine", ENGINES)
def test_rewrite_erases_the_bytes(in_memory, engine):
    path, secret, mark = in_memory / "s", 0x5345435245544B45, 1234567
    log = new(path, engine)
    put(log, [secret, 1], mark)
    log.commit()
    put(log, [2], 2)
    log.commit()
    before = {name: os.link(path / name, in_memory / name) for name in os.listdir(path)}  # keeps the old files
    chunk = log.chunks()[0]
    reader = Log.open(path)
    with pytest.raises(StoreError, match="readers"):
        log.rewrite([(ints([2]), values([2]))], erase=True)
    reader.close()
    log.rewrite([(ints([2]), values([2]))], erase=True)
    assert contents(log) == {2: 2} and log.generation == 1 and log.rows == 1
    assert int(chunk.columns["stamp"][0]) == 0  # the mapped memory too
    del chunk
    needles = [secret.to_bytes(8, "little"), mark.to_bytes(8, "little")]
    found = [p for p in [*path.iterdir(), *(in_memory / name for name in before)] for needle in needles if needle in p.read_bytes()]
    assert not found
    log.close()
    assert stored(path) == {2: 2}


@pytest.mark.parametrize("engine", ENGINES)
def test_rewrite_and_readers(in_memory, engine):
    log = new(in_memory / "s", engine)
    put(log, range(100), 1)
    log.commit()
    reader, late = Log.open(in_memory / "s"), Log.open(in_memory / "s")
    rows = apply({}, reader.replay())
    put(log, [5], 2)
    with pytest.raises(StoreError, match="commit or roll back"):
        log.rewrite([])
    log.commit()
    log.rewrite((ints([k]), values([3])) for k in range(50, 52))
    assert look(reader, rows) == dict.fromkeys(range(100), 1)  # the old files, until refresh
    changes = reader.refresh()
    assert changes.restart and look(reader, apply({}, changes)) == {50: 3, 51: 3}
    log.rewrite([])
    assert late.refresh().restart and contents(late) == {}
    put(log, [7], 7)
    log.commit()
    assert look(late, apply({}, late.refresh())) == {7: 7}
    log.close()
    with pytest.raises(StoreError, match="closed"):
        log.chunks()
    assert sum(name.startswith("segment") for name in os.listdir(in_memory / "s")) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_snapshot_is_a_store_of_its_own(in_memory, engine):
    with new(in_memory / "s", engine) as log:
        put(log, range(100), 1)
        log.commit()
        put(log, [500], 5)  # not committed
        log.snapshot(in_memory / "copy")
        with pytest.raises(StoreError, match="already"):
            log.snapshot(in_memory / "copy")
        log.rollback()
        put(log, [1], 2)
        log.commit()
    with Log.open(in_memory / "copy", "w") as log:
        assert contents(log) == dict.fromkeys(range(100), 1)
        put(log, [3], 3)
        log.commit()
    assert stored(in_memory / "copy") == dict.fromkeys(range(100), 1) | {3: 3}
    assert stored(in_memory / "s") == dict.fromkeys(range(100), 1) | {1: 2}


def test_wrong_calls_are_named_and_change_nothing(in_memory):
    log = new(in_memory / "s")
    good = values([1, 2])
    for keys, given, error, match in (
        (texts("str", ["a", "b"]), good, TypeError, "keys: expected int64, got str"),
        (ints([1, 2]), {"value": good["value"]}, ValueError, "columns value, stamp"),
        (ints([1, 2]), good | {"value": good["value"].double()}, TypeError, "value: expected torch.float32"),
        (ints([1]), good, ValueError, "value: expected shape"),
    ):
        with pytest.raises(error, match=match):
            log.append(keys, given)
    assert log.rows == 0 and log.commit() == 0
    for make, error in (
        (lambda: Schema("float", SMALL.columns), ValueError),
        (lambda: Schema("int64", {}), ValueError),
        (lambda: Schema("int64", {"a": ((-1,), torch.int8)}), ValueError),
        (lambda: Schema("int64", {"a": ((1,), torch.qint8)}), TypeError),
        (lambda: Log.open(in_memory / "s", "x"), ValueError),
        (lambda: Log.open(in_memory / "s", "r", durability="often"), ValueError),
        (lambda: Log.open(in_memory / "nothing"), StoreError),
        (lambda: Log.create(in_memory / "s", SMALL), StoreError),
        (lambda: Log.create(in_memory, SMALL), StoreError),  # not empty
    ):
        with pytest.raises(error, match="store: "):
            make()
    with Log.open(in_memory / "s") as reader:
        for call in (lambda: put(reader, [1], 1), reader.commit, reader.rollback, lambda: reader.forget(ints([1]))):
            with pytest.raises(StoreError, match="reading only"):
                call()
    log.close()


def test_network_file_systems_are_refused(in_memory, monkeypatch):
    kind = disk.file_system(in_memory)
    assert kind or not disk.MOUNTS.exists()
    mounts = in_memory / "mountinfo"
    deep = in_memory / "wïth space" / "s"
    point = str(in_memory / "wïth space").replace(" ", "\\040")
    monkeypatch.setattr(disk, "MOUNTS", mounts)
    for name in ("nfs4", "cifs", "fuse.sshfs", "9p"):
        mounts.write_text(f"1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 0:9 / {point} rw,x shared:1 - {name} host:/x rw\n")
        with pytest.raises(StoreError, match=f"network file system \\({name}\\)"):
            Log.create(deep, SMALL)
        assert disk.file_system(in_memory) == "ext4"
    mounts.unlink()
    new(deep).close()
    mounts.write_text(f"2 1 0:9 / {point} rw,x shared:1 - nfs host:/x rw\n")
    for mode in "rw":
        with pytest.raises(StoreError, match="network file system"):
            Log.open(deep, mode)


def test_a_missing_engine_is_named(in_memory, monkeypatch):
    new(in_memory / "s").close()
    folder.write_marker(in_memory / "s", store_format.Marker("lmdb", 1), True)
    (in_memory / "s" / "index-00000001.lmdb").touch()
    find = memkernels.store.engine.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "lmdb" else find(name, *rest))
    with pytest.raises(StoreError, match=r"pip install memkernels\[store\]"):
        Log.open(in_memory / "s")


def test_files_are_as_long_as_their_rows(in_memory):
    with new(in_memory / "s", segment_bytes=1 << 24) as log:
        put(log, range(3), 1)
        log.commit()
        assert log.nbytes() > 0
        big = log.chunks()[0]
        assert big.rows > 1000 and log.chunks()[0] is big
    assert os.path.getsize(in_memory / "s" / "segment-00000001.mkv") == 4096 + 3 * 32
    assert keys_of(ints([1])) == [1]


def test_no_pickle_nor_eval_on_any_path():
    banned = {"pickle", "marshal", "shelve", "ctypes", "numpy", "dill"}
    calls = {"eval", "exec", "compile", "__import__"}
    for path in (PACKAGE / "store").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & banned, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in calls and called not in ("torch.load", "torch.save"), (path, called)
