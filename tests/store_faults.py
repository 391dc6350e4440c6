"""Helpers of the fault tests: a script of commits whose every state is known, disks that fail, crash states."""

from __future__ import annotations

import errno
import os
import random
import signal
import sqlite3
import struct
import traceback

from store_logs import contents, ints, put, values

from memkernels.store import disk, engine_sqlite
from memkernels.store.log import Log

try:
    from memkernels.store import engine_lmdb
except ImportError:
    engine_lmdb = None

_CONNECT, _OPEN = sqlite3.connect, engine_lmdb and engine_lmdb.lmdb.open

CALLS = ("open", "pwrite", "ftruncate", "fdatasync", "fsync", "rename", "unlink")


def step(seed, commit, model, big=60):
    """(what, keys to put, keys to forget, the state after) of the commit that follows a state; every one changes something."""
    draw = random.Random(f"{seed} {commit}")
    keys = [draw.randrange(200) for _ in range(draw.choice((1, 1, 3, 20, big)))]
    gone = [draw.randrange(200) for _ in range(draw.choice((0, 0, 2)))]
    what = "rewrite" if draw.random() < 0.04 else "commit"
    after = dict(model)
    if what == "commit":
        after |= dict.fromkeys(keys, commit)
        after = {key: stamp for key, stamp in after.items() if key not in gone}
    return what, keys, gone, after


def perform(log, what, keys, gone, model, commit):
    if what == "rewrite":
        log.rewrite([(ints(model), values(model.values()))])
    else:
        put(log, keys, commit)
        log.forget(ints(gone))
        log.commit()
    log.wait()


def fork(work):
    """(pid, pipe) of a child that runs work(pipe) and ends."""
    out, into = os.pipe()
    pid = os.fork()
    if pid:
        os.close(into)
        return pid, out
    try:
        os.close(out)
        work(into)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def wait(pid, pipe):
    """(exit status or -signal, all it wrote)."""
    parts = []
    while part := os.read(pipe, 1 << 16):
        parts.append(part)
    os.close(pipe)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), b"".join(parts)


def in_child(work):
    """Runs work() in a forked child, which must end well."""
    status, said = wait(*fork(lambda into: os.write(into, repr(work()).encode())))
    assert status == 0, status
    return said.decode()


def writer(path, seed, durability, model, stop_at=None):
    """The child of the kill tests: commits without end, and tells the number of each. `stop_at`: the system call to die in."""

    def work(into):
        if stop_at is not None:
            disk.system = Dying(stop_at)
        state = dict(model)
        with Log.open(path, "w", durability=durability) as log:
            os.write(into, struct.pack("<q", log.commit_number))
            while True:
                commit = log.commit_number + 1
                what, keys, gone, after = step(seed, commit, state)
                perform(log, what, keys, gone, state, commit)
                state = after
                os.write(into, struct.pack("<q", commit))

    return work


class Dying:
    """Kills its process in the n-th call: before it, in the middle of a write, or behind it."""

    def __init__(self, n):
        self.left, self.how = n // 3 + 1, n % 3

    def __getattr__(self, name):
        def call(*args):
            self.left -= 1
            if self.left == 0:
                try:
                    if self.how == 1 and name == "pwrite":
                        os.pwrite(args[0], memoryview(args[1])[: len(args[1]) // 2], args[2])
                    elif self.how == 2:
                        getattr(os, name)(*args)
                finally:  # also where the call fails, as removing what is not there does
                    os.kill(os.getpid(), signal.SIGKILL)
            return getattr(os, name)(*args)

        return call if name in CALLS else getattr(os, name)


class Failing:
    """The n-th call (from 1 on) fails; writes have gone half way then. `made` lists the calls, `after` those since."""

    def __init__(self, n=None, code=errno.EIO, calls=CALLS):
        self.n, self.code, self.calls, self.made, self.after, self.failed = n, code, calls, [], [], None

    def __getattr__(self, name):
        def call(*args):
            self.made.append(name)
            if self.failed:
                self.after.append(name)
            if len(self.made) == self.n:
                self.failed = name
                if name == "pwrite":
                    os.pwrite(args[0], memoryview(args[1])[: len(args[1]) // 2], args[2])
                raise OSError(self.code, os.strerror(self.code))
            return getattr(os, name)(*args)

        return call if name in self.calls else getattr(os, name)


def check_recovered(path, seed, model, acknowledged, started):
    """Opens what a crash left: nothing acknowledged is lost, no commit is there in part. Gives the commit and its state."""
    with Log.open(path) as log:
        commit = log.commit_number
        assert acknowledged <= commit <= started, (acknowledged, commit, started)
        found = contents(log)
        assert log.verify().ok
    known, number = model
    while number < commit:
        number += 1
        _, _, _, known = step(seed, number, known)
    assert found == known, commit
    return known, commit


class EngineFaults:
    """The n-th call (from 1 on) of an engine's library fails with `error`. `how` a commit does: 0: undone, 1: done all the same, 2: still
    open, where the library can leave it so. `made` lists the calls."""

    def __init__(self, n=None, error=None, how=0, calls=None):
        self.n, self.error, self.how, self.calls, self.made, self.failed, self.after = n, error, how, calls, [], None, []

    def count(self, name):
        """Whether this call fails."""
        if self.calls and name not in self.calls:
            return False
        self.made.append(name)
        if self.failed:
            self.after.append(name)
        if len(self.made) == self.n:
            self.failed = name
        return len(self.made) == self.n

    def install(self, monkeypatch):
        monkeypatch.setattr(engine_sqlite.sqlite3, "connect", self._connect)
        if engine_lmdb is not None:
            monkeypatch.setattr(engine_lmdb.lmdb, "open", self._open)

    def _connect(self, *args, **kwargs):
        faults = self
        if self.count("connect"):
            raise self.error

        class Connection(sqlite3.Connection):
            def execute(self, statement, *values):
                word = statement.split()[0]
                if faults.count(word):
                    if word == "COMMIT" and faults.how != 2:
                        super().execute("ROLLBACK" if faults.how == 0 else "COMMIT")
                    raise faults.error
                return super().execute(statement, *values)

        return _CONNECT(*args, factory=Connection, **kwargs)

    def _open(self, *args, **kwargs):
        if self.count("open"):
            raise self.error
        return FailingLmdb(self, _OPEN(*args, **kwargs))


class FailingLmdb:
    """An environment, a transaction or a cursor of LMDB whose calls are counted."""

    def __init__(self, faults, inner):
        self._faults, self._inner = faults, inner

    def __getattr__(self, name):
        call = getattr(self._inner, name)

        def counted(*args, **kwargs):
            if name not in ("abort", "close") and self._faults.count(name):
                if name == "commit":  # LMDB ends a transaction whose commit fails
                    self._inner.commit() if self._faults.how == 1 else self._inner.abort()
                raise self._faults.error
            found = call(*args, **kwargs)
            return FailingLmdb(self._faults, found) if name in ("begin", "cursor") else found

        return counted
