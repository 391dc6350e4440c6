"""The speeds promised for the store on disk (read by targets.py): commits, space and opening, against sqlite3 and LMDB holding the values.

Every target measures its peers, and the fsync that a bar names, in the same run and on the same disk, in turns.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memkernels.bench.row import Row
from memkernels.store import KeyValueStore
from memkernels.store.keys import KeyBatch
from memkernels.store.log import Log, Schema

PLACE = Path(__file__).resolve().parent.parent / "build"  # on the disk that is measured; /tmp may be in memory
ROWS, WIDTH = 20_000, 128  # 512 bytes a row
VALUES = Schema("int64", {"value": ((WIDTH,), torch.float32)})


@dataclass(frozen=True)
class DiskTarget:
    """`run(folder, seconds)` gives for each bar (ms, peer's ms or None, the figure that the bar is about)."""

    op: str
    size: str
    bars: dict[str, float]
    at_most: bool
    run: Callable[[Path, float], dict[str, tuple[float, float | None, float]]]

    @property
    def name(self) -> str:
        return f"{self.op} {self.size}"

    def measure(self, seconds: float) -> list[dict[str, Any]]:
        PLACE.mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=PLACE))
        try:
            found = self.run(folder, seconds)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        rows = []
        for bar, needed in self.bars.items():
            ms, peer_ms, figure = found[bar]
            row = Row(
                self.op,
                self.size,
                "float32",
                "durable",
                torch.get_num_threads(),
                "disk",
                "store",
                "",
                bar,
                ms,
                peer_ms,
                None,
                None,
                None,
                "",
            )
            reached = figure <= needed if self.at_most else figure >= needed
            verdict = dict(needed=needed, at_most=self.at_most, measured=figure, reached=reached)
            rows.append({**row.__dict__, "target": self.name, "bar": bar, **verdict})
        return rows


def _keys(i: int, n: int = ROWS) -> torch.Tensor:
    return torch.arange(i * n, (i + 1) * n)


def _memkernels(folder: Path, engine: str | None = None) -> Callable[[int, torch.Tensor], None]:
    log = Log.create(folder / f"log-{engine}", VALUES, engine=engine)

    def commit(i: int, values: torch.Tensor) -> None:
        log.append(KeyBatch("int64", ints=_keys(i, len(values))), {"value": values})
        log.commit()

    return commit


def _sqlite(folder: Path) -> Callable[[int, torch.Tensor], None]:
    """One table with the values in it, a write-ahead log, synchronous=FULL."""
    connection = sqlite3.connect(folder / "peer.sqlite", isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("CREATE TABLE kv (k INTEGER PRIMARY KEY, v BLOB)")

    def commit(i: int, values: torch.Tensor) -> None:
        data = values.numpy()
        connection.execute("BEGIN")
        connection.executemany("INSERT OR REPLACE INTO kv VALUES (?, ?)", zip(_keys(i, len(values)).tolist(), map(memoryview, data)))
        connection.execute("COMMIT")

    return commit


def _lmdb(folder: Path) -> Callable[[int, torch.Tensor], None]:
    """Keys in order with their values in one transaction, through putmulti: the fastest that LMDB's binding offers."""
    import lmdb

    environment = lmdb.open(str(folder / "peer.lmdb"), subdir=False, map_size=1 << 36)

    def commit(i: int, values: torch.Tensor) -> None:
        keys = [k.to_bytes(8, "big") for k in _keys(i, len(values)).tolist()]
        with environment.begin(write=True) as transaction:
            transaction.cursor().putmulti(list(zip(keys, map(bytes, values.numpy()))), append=True)

    return commit


def _turns(works: dict[str, Callable[[int], None]], seconds: float, most: int) -> dict[str, float]:
    """Median ms of each, in turns; the first turn is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    start, i = time.perf_counter(), 0
    while i < 3 or (i < most and time.perf_counter() - start < seconds * len(works)):
        for name, work in works.items():
            before = time.perf_counter()
            work(i)
            times[name].append((time.perf_counter() - before) * 1e3)
        i += 1
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def _batches(folder: Path, seconds: float) -> dict[str, tuple[float, float | None, float]]:
    values = torch.randn(ROWS, WIDTH)
    makers = {"memkernels": _memkernels(folder), "sqlite3": _sqlite(folder), "LMDB": _lmdb(folder)}
    ms = _turns({name: lambda i, work=work: work(i, values) for name, work in makers.items()}, seconds, 40)  # type: ignore[misc]
    mine = ms["memkernels"]
    found = {name: (mine, ms[name], ms[name] / mine) for name in ("sqlite3", "LMDB")}
    return {"rows a second": (mine, None, ROWS / mine * 1e3), **found}


def _space(folder: Path, seconds: float) -> dict[str, tuple[float, float | None, float]]:
    commit, values = _memkernels(folder), torch.randn(ROWS, WIDTH)
    start = time.perf_counter()
    for i in range(10):
        commit(i, values)
    size = sum(f.stat().st_blocks * 512 for f in (folder / "log-None").iterdir())
    return {"of the data": ((time.perf_counter() - start) * 1e3, None, size / (10 * ROWS * 4 * WIDTH))}


def _single(folder: Path, seconds: float) -> dict[str, tuple[float, float | None, float]]:
    """A commit of one row, next to fdatasync of one page of a file that is there."""
    commit, value = _memkernels(folder), torch.randn(1, WIDTH)
    fd = os.open(folder / "page", os.O_RDWR | os.O_CREAT)

    def sync(i: int) -> None:
        os.pwrite(fd, i.to_bytes(4096, "little"), 0)
        os.fdatasync(fd)

    ms = _turns({"memkernels": lambda i: commit(i, value), "fsync": sync}, seconds, 1000)
    os.close(fd)
    return {"ms beyond one fsync": (ms["memkernels"], ms["fsync"], ms["memkernels"] - ms["fsync"])}


def _open(folder: Path, seconds: float) -> dict[str, tuple[float, float | None, float]]:
    """Ten million int64 keys, as commits of 100,000 wrote them: the log alone, which reads every run, and the store with its index."""
    log = Log.create(folder / "s", Schema("int64", {"value": ((1,), torch.uint8)}), durability="none")
    for _ in range(100):
        keys = torch.randint(-(2**63), 2**63 - 1, (100_000,))
        log.append(KeyBatch("int64", ints=keys), {"value": torch.zeros(100_000, 1, dtype=torch.uint8)})
        log.commit()
    log.close()

    def read(i: int) -> None:
        with Log.open(folder / "s") as log:
            assert sum(len(keys) for keys, _ in log.replay()) == 10_000_000

    def whole(i: int) -> None:
        with KeyValueStore.open(folder / "s") as store:
            assert bool(store.contains(keys).all())

    ms = _turns({"log": read, "store": whole}, seconds, 20)
    return {"seconds for the log": (ms["log"], None, ms["log"] / 1e3), "seconds": (ms["store"], None, ms["store"] / 1e3)}


def disk_targets() -> Iterator[DiskTarget]:
    """Rows of the log of a store."""
    yield DiskTarget("store commit", "20000x512B", {"rows a second": 250e3, "sqlite3": 3, "LMDB": 1}, False, _batches)
    yield DiskTarget("store space", "200000x512B", {"of the data": 1.25}, True, _space)
    yield DiskTarget("store single commit", "1x512B", {"ms beyond one fsync": 1}, True, _single)
    yield DiskTarget("store open", "10M int64 keys", {"seconds for the log": 1, "seconds": 5}, True, _open)
