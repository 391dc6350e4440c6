"""The directory of a store: who may use it, which of its files are in use, and what is left over."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from memkernels.store import disk
from memkernels.store.engine import engine_files
from memkernels.store.errors import StoreError, StoreFormatError
from memkernels.store.format import HEADER, MARKER, Marker, SegmentHeader, State
from memkernels.store.segments import file_name

_OWN = re.compile(r"LOCK|READERS|JOURNAL|UNFINISHED|ENGINE\.new|index-\d{8,}\.(lmdb|sqlite)(-\w+)?|segment-\d{8,}\.mkv")

UNFINISHED = "UNFINISHED"  # there while a store is created


def make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise StoreError(f"store: {folder} cannot be a directory: a file is in its place") from None


def read_marker(folder: Path) -> Marker:
    try:
        return Marker.decode(disk.read_small(folder / "ENGINE", MARKER))
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"store: there is no store at {folder}") from None


def write_marker(folder: Path, marker: Marker, durable: bool) -> None:
    disk.replace_file(folder / "ENGINE", marker.encode(), durable)


def lock_writer(folder: Path, new: bool = False) -> int:
    """The descriptor that makes this the one writer; of a new store a failure leaves no file."""
    path = folder / "LOCK"
    fd = disk.lock(path, exclusive=True)
    if fd is None:
        with contextlib.suppress(OSError, StoreFormatError, ValueError):
            pid = int(disk.read_small(path, 32))
            raise StoreError(f"store: {folder} is being written by process {pid}; a store has one writer")
        raise StoreError(f"store: {folder} is being written by another process; a store has one writer")
    try:
        disk.resize(fd, 0)
        disk.write_at(fd, str(os.getpid()).encode(), 0)
    except BaseException:
        if new:
            path.unlink()
        os.close(fd)
        raise
    return fd


def holds(folder: Path, fd: int | None) -> bool:
    """Whether the writer's lock is that of this folder still."""
    return fd is not None and disk.names(f"{folder}/LOCK", fd)


def check_lock(folder: Path, fd: int | None) -> None:
    """Raises when it is not: what is written then would be of no store, or in the place of what another writer wrote."""
    if not holds(folder, fd):
        raise StoreError(
            f"store: {folder} was moved or removed, or its file LOCK was, while it was open to write: close it and open it again"
        )


def lock_reader(folder: Path) -> int | None:
    """The descriptor that keeps the files from being erased; None where nothing can be written, so that nobody can erase either."""
    try:
        fd = disk.lock(folder / "READERS", exclusive=False)
    except OSError:
        return None
    if fd is None:
        raise StoreError(f"store: {folder} is being erased by its writer; open it when that is done")
    return fd


def lock_out_readers(folder: Path) -> int:
    fd = disk.lock(folder / "READERS", exclusive=True)
    if fd is None:
        raise StoreError(f"store: {folder} is open for reading elsewhere: what others still read cannot be erased; close the readers first")
    return fd


@contextlib.contextmanager
def creating(folder: Path) -> Iterator[int]:
    """Around the creation of a store: gives the lock of its writer, which the caller closes. One that fails leaves nothing behind."""
    there = folder.exists()
    make(folder)
    try:
        disk.refuse_network(folder)
        check_new(folder)  # before anything is put there
        fd = lock_writer(folder, new=True)
    except BaseException:
        if not there:
            with contextlib.suppress(OSError):  # not empty: it is somebody else's
                folder.rmdir()
        raise
    try:
        check_new(folder)
    except BaseException:
        os.close(fd)
        raise
    try:
        os.close(disk.open_file(folder / UNFINISHED, os.O_CREAT | os.O_WRONLY))
        for name in sorted(os.listdir(folder)):  # of a creation that was cut off
            if name not in ("LOCK", "READERS", UNFINISHED):
                disk.remove(folder / name)
        yield fd
        disk.remove(folder / UNFINISHED)
    except BaseException:
        with contextlib.suppress(OSError):  # the error that is on its way says more
            _discard(folder, there)
        raise


def _discard(folder: Path, there: bool) -> None:
    names = [name for name in os.listdir(folder) if _OWN.fullmatch(name) and name not in ("LOCK", "READERS", UNFINISHED)]
    for name in ("ENGINE", *names, UNFINISHED):  # what makes it a store first, what says that it is none last
        (folder / name).unlink(missing_ok=True)
    if not there:
        for name in ("READERS", "LOCK"):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def check_new(folder: Path) -> None:
    """Refuses a directory that holds anything but what a creation that was cut off left."""
    if (folder / "ENGINE").exists():
        raise StoreError(f"store: there is a store at {folder} already")
    names = sorted(os.listdir(folder))
    if other := [name for name in names if not _OWN.fullmatch(name)]:
        raise StoreError(f"store: {folder} is not empty: {', '.join(other[:5])}")
    if UNFINISHED not in names and (lost := [name for name in names if name.startswith(("segment-", "JOURNAL"))]):
        raise StoreFormatError(f"store: {folder} holds {', '.join(lost[:5])} but no ENGINE: a store that lost it; nothing was changed")


def remove_unused(folder: Path, marker: Marker, state: State) -> None:
    """Removes the files that neither the marker nor the state names: of a commit or a rewrite that was cut off, or rewritten."""
    used = {path.name for path in engine_files(folder, marker.engine, marker.number)} | {"LOCK", "READERS", "JOURNAL"}
    used |= {file_name(state.first_segment + i) for i in range(state.segments)}
    for name in sorted(os.listdir(folder)):
        if name not in used and _OWN.fullmatch(name):
            with contextlib.suppress(FileNotFoundError):  # a reader's sqlite removes its own
                disk.remove(folder / name, marker.erase)


def refuse_foreign(folder: Path, state: State) -> None:
    """A whole segment of another store in the directory: the index is not the one that belongs there."""
    for path in sorted(folder.glob("segment-*")):
        try:
            fd = disk.open_file(path, os.O_RDONLY)
        except FileNotFoundError:  # a writer has just removed it
            continue
        try:
            header = SegmentHeader.decode(path.name, disk.read_at(fd, HEADER, 0))
        except StoreFormatError:  # of a creation that was cut off; `Segments.open` says so of one that is needed
            continue
        finally:
            os.close(fd)
        if header.store != state.store:
            raise StoreFormatError(f"store: {path} belongs to another store than the index beside it; nothing was changed")
