"""What `compact(erase=True)` promises of memory: another process looks for erased values in all of it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from child import ROOT

from memkernels._freed import wipe_freed

WIDTH = 64
CHILD = """
import sys, torch, memkernels as mk
path, count = sys.argv[1] or None, 400
def put(begin, factor, **how):
    values = ((torch.arange(64).square() * factor + factor) % 251).to(torch.uint8).repeat(count, 1)
    store.store(torch.arange(begin, begin + count), values, **how)
    values.zero_()
store = mk.KeyValueStore(64, torch.uint8, path=path)
for begin, factor in ((0, 3), (400, 5), (800, 7), (800, 11), (1200, 13)):
    put(begin, factor)
put(400, 17, if_absent=True)
put(400, 19, accumulate=True)
store.commit()
if path:
    put(1600, 23)
    store.rollback()
store.erase(torch.arange(400))
put(400, 29)
store.commit()
for key in (5, 405, 805, 1205):
    store.get(key)
store.compact(erase=True)
print(len(store), flush=True)
sys.stdin.readline()
"""


def pattern(factor: int) -> bytes:
    return bytes((torch.arange(WIDTH).square() * factor + factor).remainder(251).tolist())[8:40]


def count_in_memory(pid: int, needles: dict[int, bytes]) -> dict[int, int]:
    """How often each is in what a process can write to."""
    found = dict.fromkeys(needles, 0)
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if line.split()[1][:2] != "rw" or "[v" in line:
                continue
            begin, end = (int(n, 16) for n in line.split()[0].split("-"))
            memory.seek(begin)
            data = memory.read(end - begin)
            for name, needle in needles.items():
                found[name] += data.count(needle)
    return found


@pytest.mark.skipif(not Path("/proc/self/mem").exists() or platform.libc_ver()[0] != "glibc", reason="needs Linux with glibc")
@pytest.mark.parametrize("on_disk", [False, True])
def test_erased_values_are_nowhere_in_memory(tmp_path, on_disk):
    """Neither in the store's buffers nor in what batches on their way, checksums and the engine have left in freed memory."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD, str(tmp_path / "s") if on_disk else ""]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables) as child:
        assert child.stdout.readline().strip() == "1200"
        found = count_in_memory(child.pid, {factor: pattern(factor) for factor in (3, 5, 7, 13, 17, 19, 23, 29)})
        child.stdin.write("\n")
    assert not any(found[factor] for factor in (3, 5, 7, 17, 19, 23)), found
    if not on_disk:
        assert found[13] >= 400 and found[29] >= 400, "what is there is found"
    for file in (tmp_path / "s").glob("*"):
        assert not any(pattern(factor) in file.read_bytes() for factor in (3, 5, 7, 17, 19, 23)), file


def test_freed_memory_may_be_wiped_at_any_time():
    kept = [torch.full((n,), float(n)) for n in range(1, 2000, 7)]
    gone = [torch.ones(n) for n in range(1, 2000, 3)]
    del gone
    wipe_freed()
    assert all(bool((tensor == len(tensor)).all()) for tensor in kept)
