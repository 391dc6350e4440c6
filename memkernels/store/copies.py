"""New files from what is there: a new store, a rewritten one, a copy."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from memkernels.store import disk, folder
from memkernels.store.catalog import SCHEMA, STATE, follows, run_key, runs
from memkernels.store.crc32c import crc32c
from memkernels.store.engine import Transaction, engine_files, open_engine
from memkernels.store.format import Marker, Schema, State, damaged
from memkernels.store.journal import Journal
from memkernels.store.keys import KeyBatch
from memkernels.store.runs import Run
from memkernels.store.segments import Segments
from memkernels.store.tail import Tail

if TYPE_CHECKING:
    from memkernels.store.log import Log
    from memkernels.store.view import View


def new_engine(path: Path, marker: Marker, schema: Schema, durable: bool, fill: Callable[[Transaction], State]) -> None:
    """An engine's file with one transaction in it: what `fill` puts, and the state that it gives."""
    for old in engine_files(path, marker.engine, marker.number):
        if old.exists():
            disk.remove(old)
    engine = open_engine(path, marker.engine, marker.number, write=True, sync=durable, create=True)
    try:
        transaction = engine.begin(True)
        try:
            transaction.put(SCHEMA, schema.to_json())
            transaction.put(STATE, fill(transaction).encode())
        except BaseException:
            transaction.abort()
            raise
        transaction.commit()
    finally:
        engine.close()
    if durable:
        disk.sync_directory(path)


def trim(log: Log) -> None:
    """Gives back what a log that is closed needs no more, if the folder is its own still. Nothing depends on the length of segments."""
    if folder.holds(log.path, log._lock_fd):
        with contextlib.suppress(OSError):
            log._segments.trim(log._state.rows)
        if log._journal is not None:
            log._journal.close(remove=True)


def rewrite(log: Log, batches: Iterable[tuple[KeyBatch, dict[str, Tensor]]], erase: bool) -> None:
    """See Log.rewrite. The step is the renaming of the marker."""
    readers = folder.lock_out_readers(log.path) if erase else None
    try:
        marker, old = Marker(log.engine, log._marker.number + 1, erase), log._state
        first = old.first_segment + len(log._segments.files)
        state = dataclasses.replace(old, commit=old.commit + 1, generation=old.generation + 1, rows=0, first_segment=first)
        _write_all(log, marker, state, batches)
        try:
            folder.write_marker(log.path, marker, log._syncs())
        except BaseException as error:
            log._fail(error)
            raise
        _switch(log, erase)
    finally:
        if readers is not None:
            os.close(readers)


def _write_all(log: Log, marker: Marker, state: State, batches: Iterable[tuple[KeyBatch, dict[str, Tensor]]]) -> None:
    """The new files; removed again when it raises."""
    segments = Segments(log.path, log.schema, state)
    tail, pieces = Tail(segments, 0), itertools.count()

    def put(transaction: Transaction, run: Run) -> None:
        run.first_commit = run.last_commit = state.commit
        transaction.put(run_key(state.commit, next(pieces)), run.encode())

    def fill(transaction: Transaction) -> State:
        for keys, values in batches:
            log._check_batch(keys, values)
            tail.append(keys, values)
            while len(tail.runs) > 1:
                put(transaction, tail.runs.pop(0))
        for run in tail.take():
            put(transaction, run)
        if log._syncs():
            segments.sync()
        return dataclasses.replace(state, rows=tail.rows)

    try:
        new_engine(log.path, marker, log.schema, log._syncs(), fill)
    except BaseException:
        with contextlib.suppress(OSError):
            folder.remove_unused(log.path, log._marker, log._state)
        raise
    finally:
        segments.close()


def _switch(log: Log, erase: bool) -> None:
    """Opens the new files, which are the store from now on; then removes the old ones."""
    engine, segments = log._engine, log._segments
    write_ahead = [path for path in engine_files(log.path, log.engine, log._marker.number) if path.suffix == ".sqlite-wal"]
    assert engine is not None
    try:
        log._load()
    except BaseException as error:
        log._fail(error)
        raise
    log._given = log._state.commit
    try:
        if erase:
            segments.wipe()
            (log._journal or Journal(log.path)).wipe()  # a log that uses none may have found one
            for path in filter(Path.exists, write_ahead):  # sqlite removes it when it closes
                disk.overwrite(path)
    finally:
        engine.close()
        segments.close()
    folder.remove_unused(log.path, log._marker, log._state)


def snapshot(log: View, transaction: Transaction, path: Path) -> None:
    """See Log.snapshot. `transaction` is on log._state."""
    lock = None
    try:
        with folder.creating(path) as lock:
            state = dataclasses.replace(log._state, first_segment=1, store=os.urandom(16))
            source, target = log._segments, Segments(path, log.schema, state)

            def fill(out: Transaction) -> State:
                row = 0
                for what, run, key, data in runs(transaction, log.schema, state, log._records):
                    end = follows(what, run, row)
                    for count, crc in run.blocks:
                        block = source.read(row, count)
                        if crc32c(block) != crc:
                            name = source.path(row // state.capacity).name
                            raise damaged(name, f"wrong checksum of rows {row} to {row + count}")
                        target.write_block(row, block)
                        row += count
                    row = end
                    out.put(key, data)
                if row != state.rows:
                    raise damaged("the index", f"checksums of {row} rows of {state.rows}")
                target.sync()
                return state

            try:
                new_engine(path, Marker(log.engine, 1), log.schema, True, fill)
            finally:
                target.close()
            folder.write_marker(path, Marker(log.engine, 1), True)
        disk.sync_directory(path.absolute().parent)
    finally:
        if lock is not None:
            os.close(lock)
