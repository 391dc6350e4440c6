"""Every system call that changes a file of the store goes through here, so that a test can make any one of them fail."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from pathlib import Path
from typing import Any

from memkernels.store.errors import StoreError, StoreFormatError

NETWORK = {"9p", "afs", "beegfs", "ceph", "cifs", "davfs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "smb2", "smb3", "smbfs"}
MOUNTS = Path("/proc/self/mountinfo")
_DIRECTORY = "store: {} is a directory where a file of a store belongs"
system: Any = os  # what the calls below call


def open_file(path: Path, flags: int) -> int:
    try:
        fd = system.open(path, flags | os.O_CLOEXEC, 0o666)
    except IsADirectoryError:
        raise StoreFormatError(_DIRECTORY.format(path)) from None
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        os.close(fd)
        raise StoreFormatError(_DIRECTORY.format(path))
    return fd


def write_at(fd: int, data: Any, offset: int) -> None:
    """All of `data`; a short write is continued."""
    view = memoryview(data).cast("B")
    while len(view):
        written = system.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def read_at(fd: int, size: int, offset: int) -> bytes:
    """Up to `size` bytes: fewer only at the end of the file."""
    parts = []
    while size and (part := system.pread(fd, size, offset)):
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_into(fd: int, buffer: memoryview, offset: int) -> int:
    """How many bytes came: 0 at the end of the file."""
    return system.preadv(fd, [buffer], offset)


def resize(fd: int, size: int) -> None:
    system.ftruncate(fd, size)


def allocate(path: Path, size: int) -> None:
    """Gives a file, made if it is not there, blocks of its own on the disk: a hole that is written to through a mapping ends the process
    where the disk is full. Raises OSError."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except IsADirectoryError:
        raise StoreFormatError(_DIRECTORY.format(path)) from None
    try:
        if os.fstat(fd).st_blocks * 512 < size:
            os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, error.strerror, str(path)) from None  # other file systems may not know the call
    finally:
        os.close(fd)


def sync_data(fd: int) -> None:
    getattr(system, "fdatasync", system.fsync)(fd)


def sync_directory(path: Path) -> None:
    """Makes names created, renamed or removed in a directory durable."""
    fd = system.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        system.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, data: bytes, durable: bool = True) -> None:
    """The file has either its old content or this one, whenever the machine stops."""
    beside = path.with_name(path.name + ".new")
    fd = open_file(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        write_at(fd, data, 0)
        if durable:
            sync_data(fd)
    finally:
        os.close(fd)
    system.rename(beside, path)
    if durable:
        sync_directory(path.parent)


def overwrite(path: Path) -> None:
    """Zeros in place of the bytes of a file, on disk."""
    fd = open_file(path, os.O_WRONLY)
    try:
        size, zeros = os.fstat(fd).st_size, bytes(1 << 20)
        for offset in range(0, size, len(zeros)):
            write_at(fd, memoryview(zeros)[: size - offset], offset)
        sync_data(fd)
    finally:
        os.close(fd)


def remove(path: Path, erase: bool = False) -> None:
    """Unlinks a file; with `erase`, overwrites it before."""
    if erase:
        overwrite(path)
    system.unlink(path)


def forget_cached(path: Path) -> None:
    """Drops a file's pages from the system's cache: after a failed fsync they may hold what the disk does not."""
    with contextlib.suppress(OSError, AttributeError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def lock(path: Path, exclusive: bool) -> int | None:
    """A descriptor that holds the lock of a file until it is closed, or None while another one holds it."""
    while True:
        fd = _lock(path, exclusive)
        if fd is None or names(path, fd):
            return fd
        os.close(fd)  # it was removed, and perhaps made anew, before it was locked: that lock keeps nobody out


def names(path: Path | str, fd: int) -> bool:
    """Whether this is the file of that name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _lock(path: Path, exclusive: bool) -> int | None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if exclusive and isinstance(error, IsADirectoryError):
            raise StoreFormatError(_DIRECTORY.format(path)) from None
        if exclusive:
            raise
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return fd


def unlock(fd: int) -> None:
    """Also for a forked child that has not yet closed its copy."""
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def file_system(path: Path) -> str:
    """The type of the file system that a path is on, or "" where the system does not say."""
    try:
        lines = MOUNTS.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    real, best, found = os.path.realpath(path), -1, ""
    for line in lines:
        fields = line.split(" ")
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4])  # spaces and such are octal numbers there
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best and "-" in fields:  # of equal points the last mount is on top
            best, found = len(point), fields[fields.index("-") + 1]
    return found


def refuse_network(path: Path) -> None:
    kind = file_system(path)
    if kind in NETWORK or kind.removeprefix("fuse.") in NETWORK | {"sshfs", "s3fs", "gcsfuse", "rclone", "mount.s3", "goofys", "curlftpfs"}:
        raise StoreError(
            f"store: {path} is on a network file system ({kind}), whose locks, memory maps and fsync do not keep what a store promises;"
            " put it on a local disk and copy snapshots"
        )


def read_small(path: Path, limit: int) -> bytes:
    """A file of at most `limit` bytes."""
    fd = open_file(path, os.O_RDONLY)
    try:
        data = read_at(fd, limit + 1, 0)
    finally:
        os.close(fd)
    if len(data) > limit:
        raise StoreFormatError(f"store: {path} is longer than {limit} bytes")
    return data
