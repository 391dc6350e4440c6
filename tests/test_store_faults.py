"""What the log survives: kills, torn writes, disks that fail, files that were tampered with, other processes."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import struct
import time

import pytest
from store_faults import CALLS, Failing, check_recovered, fork, in_child, perform, step, wait, writer
from store_logs import ENGINES, SMALL, apply, contents, ints, look, new, put, stored, values

from memkernels.store import disk, journal, view
from memkernels.store.engine import open_engine
from memkernels.store.log import Log, StoreError, StoreFormatError


def killed_writers(path, engine, durability, seed, kills, at_calls):
    draw = random.Random(f"{seed} {engine} {durability}")
    new(path, engine, durability=durability).close()
    model, done = ({}, 0), 0
    for _ in range(kills):
        stop_at = draw.randrange(1, 400) if at_calls else None
        pid, pipe = fork(writer(path, seed, durability, model[0], stop_at))
        if stop_at is None:
            first = os.read(pipe, 8)
            time.sleep(draw.random() ** 2 * 0.06)
            os.kill(pid, signal.SIGKILL)
        status, said = wait(pid, pipe)
        assert status == -signal.SIGKILL
        numbers = [n for (n,) in struct.iter_unpack("<q", (said if at_calls else first + said)[: (len(said) // 8 + (not at_calls)) * 8])]
        last = numbers[-1] if numbers else model[1]
        model = check_recovered(path, seed, model, last, last + 1)
        done += len(numbers)
    assert done > kills / 4 and model[1] > kills / 8
    Log.open(path, "w").close()
    check_recovered(path, seed, model, model[1], model[1])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("durability", ["commit", "async", "none"])
def test_kill_at_random_moments(tmp_path, engine, durability):
    killed_writers(tmp_path / "s", engine, durability, 1, 5, False)
    killed_writers(tmp_path / "t", engine, durability, 2, 5, True)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("durability", ["commit", "async", "none"])
def test_kill_a_thousand_times(tmp_path, engine, durability):
    killed_writers(tmp_path / "s", engine, durability, 3, 100, False)
    killed_writers(tmp_path / "t", engine, durability, 4, 100, True)
