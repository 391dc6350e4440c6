"""Never a wrong value: a store on disk that was damaged says so at the first reading of rows of a damaged block."""

import errno
import os
import random
import shutil

import pytest
import torch
from store_faults import Failing, in_child
from store_logs import ENGINES

import memkernels as mk
from memkernels.store import disk
from memkernels.store.engine import default_engine
from memkernels.store.format import BLOCK, HEADER
from memkernels.store.log import Log, Schema, StoreFormatError

WIDTH, ROWS = 1000, 1500  # 4000 bytes a row: about six blocks


def values_of(keys, stamp=0):
    return (keys[:, None] * 7 + torch.arange(WIDTH) + 1000 * stamp).float()


def make(path, engine=None, rows=ROWS, segment_bytes=1 << 30):
    schema = Schema("int64", {"value": ((WIDTH,), torch.float32)}, {"capacity": None, "on_full": "grow"})
    Log.create(path, schema, engine=engine or default_engine(), segment_bytes=segment_bytes).close()
    with mk.KeyValueStore.open(path, "w") as store:
        for begin in range(0, rows, 400):
            keys = torch.arange(begin, min(begin + 400, rows))
            store.store(keys, values_of(keys))
            store.commit()


def flip(path, row, byte=17):
    segment = path / "segment-00000001.mkv"
    with open(segment, "r+b") as file:
        at = HEADER + row * WIDTH * 4 + byte
        file.seek(at)
        old = file.read(1)[0]
        file.seek(at)
        file.write(bytes([old ^ 4]))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", ["r", "w"])
def test_a_damaged_block_is_refused_and_others_are_read(in_memory, engine, mode):
    make(in_memory / "s", engine)
    flip(in_memory / "s", 900)
    with mk.KeyValueStore.open(in_memory / "s", mode) as store:
        keys = torch.tensor([3, 1499, 5000, 3])
        values, found = store.retrieve(keys)
        assert found.tolist() == [True, True, False, True] and torch.equal(values[found], values_of(keys[found]))
        for _ in range(2):  # not only the first time
            for call in (lambda: store.get(900), lambda: store.retrieve(torch.arange(ROWS)), lambda: list(store.items())):
                with pytest.raises(StoreFormatError, match=r"segment-00000001.mkv is damaged .* wrong checksum of rows \d+ to \d+"):
                    call()
        if mode == "w":
            with pytest.raises(StoreFormatError, match="wrong checksum"):
                store.store([900], values_of(torch.tensor([900])), accumulate=True)
            store.store([900], values_of(torch.tensor([900]), 1))  # a new row
            assert torch.equal(store.get(900), values_of(torch.tensor([900]), 1)[0])
            store.rollback()
        assert torch.equal(store.get(3), values_of(torch.tensor([3]))[0])


def test_when_checksums_are_compared(in_memory):
    make(in_memory / "s")
    flip(in_memory / "s", 900)
    with pytest.raises(StoreFormatError, match="wrong checksum"):
        mk.KeyValueStore.open(in_memory / "s", verify="open")
    with mk.KeyValueStore.open(in_memory / "s", verify="never") as store:
        assert store.get(900) is not None and not store.verify().ok
    with pytest.raises(ValueError, match=r"KeyValueStore.open: verify: expected .*touch"):
        mk.KeyValueStore.open(in_memory / "s", verify="now")
    mk.KeyValueStore.open(in_memory / "s", "w").close()  # nothing holds the lock
    flip(in_memory / "s", 900)
    with mk.KeyValueStore.open(in_memory / "s", verify="open") as store:
        assert not store._data.log._touched._left


def test_every_block_is_read_once(in_memory, monkeypatch):
    make(in_memory / "s", segment_bytes=HEADER + 500 * WIDTH * 4)
    with mk.KeyValueStore.open(in_memory / "s") as store:
        read = []
        segments = store._data.log._segments
        checksum = type(segments).checksum
        monkeypatch.setattr(type(segments), "checksum", lambda self, *rows: read.append(rows) or checksum(self, *rows))
        draw = random.Random(1)
        for _ in range(200):
            keys = torch.tensor([draw.randrange(-5, ROWS + 5) for _ in range(draw.choice((1, 3, 40)))])
            values, found = store.retrieve(keys)
            assert torch.equal(values[found], values_of(keys[found])) and found.tolist() == [0 <= key < ROWS for key in keys.tolist()]
        store.retrieve(torch.arange(ROWS))
        assert sum(rows for _, rows in read) == ROWS and len(set(read)) == len(read)
        assert all(rows * WIDTH * 4 <= BLOCK for _, rows in read)
        count = len(read)
        store.retrieve(torch.arange(ROWS))
        assert len(read) == count and not store._data.log._touched._left


def test_rows_of_later_commits(in_memory):
    """Those that a refresh brings, also in runs that join what was known; and what the writer itself put there."""
    make(in_memory / "s", rows=10)
    writer = mk.KeyValueStore.open(in_memory / "s", "w", durability="async")
    with mk.KeyValueStore.open(in_memory / "s") as reader:
        for step in range(1, 40):
            keys = torch.arange(step, step + 3)
            writer.store(keys, values_of(keys, step))
            writer.commit()
            writer._data.log.wait()
            assert torch.equal(writer.retrieve(keys)[0], values_of(keys, step))
            if step % 3 == 0:
                assert reader.refresh()
                assert torch.equal(reader.retrieve(keys)[0], values_of(keys, step))
        row = int(reader._data.index.find(mk.store.keys.as_batch("", "int64", [41]))[0])
        writer.store([50], values_of(torch.tensor([50])))
        writer.commit()
        writer._data.log.wait()
        flip(in_memory / "s", row + 1)
        assert reader.refresh()
        with pytest.raises(StoreFormatError, match="wrong checksum"):
            reader.get(50)
        writer.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_damaged_folders_never_give_a_wrong_value(in_memory, engine):
    make(in_memory / "s", engine, rows=500)
    draw, refused = random.Random(engine), 0
    names = sorted(name for name in os.listdir(in_memory / "s") if name not in ("LOCK", "READERS"))
    for _ in range(60):
        shutil.rmtree(in_memory / "t", ignore_errors=True)
        shutil.copytree(in_memory / "s", in_memory / "t")
        target = in_memory / "t" / draw.choice([*names, "segment-00000001.mkv"])
        data = bytearray(target.read_bytes())
        at = draw.randrange(len(data))
        data[at : at + draw.choice((1, 1, 8, 4096))] = draw.randbytes(draw.choice((1, 8, 4096)))
        target.write_bytes(data)

        def look():
            try:
                with mk.KeyValueStore.open(in_memory / "t") as store:
                    keys = torch.arange(500)
                    values, found = store.retrieve(keys)
                    assert bool(found.all()) and torch.equal(values, values_of(keys))
                return 0
            except mk.store.StoreError:
                return 1

        refused += int(in_child(look))
    assert refused > 20


def test_a_disk_that_cannot_be_read(in_memory, monkeypatch):
    make(in_memory / "s", rows=10)
    with mk.KeyValueStore.open(in_memory / "s") as store:
        monkeypatch.setattr(disk, "system", Failing(1, errno.EIO, ("preadv",)))
        with pytest.raises(OSError, match="Input/output"):
            store.get(3)
        assert torch.equal(store.get(3), values_of(torch.tensor([3]))[0])  # tried again


@pytest.mark.parametrize("engine", ENGINES)
def test_a_directory_in_place_of_a_file(in_memory, engine):
    make(in_memory / "s", engine, rows=10)
    for name in [*os.listdir(in_memory / "s"), "JOURNAL"]:
        for mode in "rw":
            shutil.rmtree(in_memory / "t", ignore_errors=True)
            shutil.copytree(in_memory / "s", in_memory / "t")
            (in_memory / "t" / name).unlink(missing_ok=True)
            (in_memory / "t" / name).mkdir()
            if name == "READERS" or (name == "LOCK" and mode == "r"):  # not needed there
                continue
            with pytest.raises(mk.store.StoreError, match=name.removesuffix("-lock")):
                mk.KeyValueStore.open(in_memory / "t", mode)
    (in_memory / "file").touch()
    for path in (in_memory / "file", in_memory / "file" / "s"):
        with pytest.raises(mk.store.StoreError, match="a file is in its place"):
            mk.KeyValueStore(2, path=path)
