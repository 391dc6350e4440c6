"""The small transactional map that holds the index of a log: what its engines share, and which ones there are."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from memkernels.store.errors import StoreError, StoreFormatError

ENGINES = ("lmdb", "sqlite")
SUFFIXES = {"lmdb": ("lmdb", "lmdb-lock"), "sqlite": ("sqlite", "sqlite-wal", "sqlite-shm", "sqlite-journal")}


class Transaction(Protocol):
    """A snapshot; of a writer, with its own changes. Ends with commit or abort, after which it is not to be used."""

    def get(self, key: bytes) -> bytes | None: ...
    def put(self, key: bytes, value: bytes) -> None: ...
    def delete(self, key: bytes) -> None: ...
    def scan(self, prefix: bytes, after: bytes) -> Iterator[tuple[bytes, bytes]]: ...
    def commit(self) -> None: ...
    def abort(self) -> None: ...


class Engine(Protocol):
    """An open file. Reads may run beside a write of another thread or process; `close` does not harm other openers."""

    def begin(self, write: bool) -> Transaction: ...
    def verify(self) -> list[str]: ...
    def close(self) -> None: ...


def default_engine() -> str:
    return "lmdb" if importlib.util.find_spec("lmdb") else "sqlite"


def engine_files(folder: Path, name: str, number: int) -> list[Path]:
    """The files an engine keeps, the main one first."""
    return [folder / f"index-{number:08d}.{suffix}" for suffix in SUFFIXES[name]]


def open_engine(folder: Path, name: str, number: int, write: bool, sync: bool = True, create: bool = False) -> Engine:
    path = engine_files(folder, name, number)[0]
    if name not in ENGINES:
        raise StoreFormatError(f"store: {folder} uses the engine {name!r}, which this memkernels does not know: use a newer one")
    if not create and not path.exists():
        raise StoreFormatError(f"store: {path} is missing")
    if name == "sqlite":
        from memkernels.store.engine_sqlite import SqliteEngine

        return SqliteEngine(path, write, sync, create)
    if not importlib.util.find_spec("lmdb"):
        raise StoreError(f"store: {folder} needs the package lmdb: pip install memkernels[store]")
    from memkernels.store.engine_lmdb import LmdbEngine

    return LmdbEngine(path, write, sync, create)
