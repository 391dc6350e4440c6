"""How much memory a call needs at its peak, beyond its inputs and outputs."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from memkernels._backends import empty_cache

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def extra_bytes(run: Callable[[], Iterable[torch.Tensor]], given: Iterable[torch.Tensor | None], device: str = "cpu") -> int | None:
    """Peak bytes of one call, without the tensors it was given and the ones it returns.

    On a CPU this is the process's resident peak as Linux counts it, so scratch memory of any library is in it. The call runs in a
    thread of its own: scratch kept from earlier calls, which belongs to a thread and its OpenMP workers, starts empty there. Exact to
    about 1 MB. On a GPU it is what torch's allocator handed out.

    Args:
        run: the call; returns its results. It should have run before, so that nothing is loaded or compiled in it.
        given: the tensors that are there before and after; a result that is a view of one of them costs nothing.
        device: "cpu" or "cuda".

    Returns: the bytes, or None where the system does not tell (not Linux, or /proc is not writable).
    """
    known = {t.untyped_storage().data_ptr() for t in given if t is not None}
    measure = _cuda_peak if device == "cuda" else _resident_peak
    if device == "cpu":
        _give_back_free_memory()
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(measure, run).result()
    if found is None:
        return None
    peak, results = found
    return max(0, peak - sum(_size(t) for t in results if t.untyped_storage().data_ptr() not in known))


def saved_bytes(run: Callable[[], object], known: Iterable[torch.Tensor]) -> int:
    """Bytes of all storages that `run` saves for backward, those of `known` tensors apart."""
    storages: dict[int, int] = {}
    kept: list[torch.Tensor] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        kept.append(t)  # an address counts once only while its storage lives
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        results = run()
    for t in known:
        storages.pop(t.untyped_storage().data_ptr(), None)
    del results
    return sum(storages.values())


Measured = tuple[int, list[torch.Tensor]]


def _size(tensor: torch.Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _cuda_peak(run: Callable[[], Iterable[torch.Tensor]]) -> Measured:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = list(run())
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, results


def _resident_peak(run: Callable[[], Iterable[torch.Tensor]]) -> Measured | None:
    try:
        _CLEAR.write_text("5")  # the peak starts again at what is resident now
        before = _resident("VmRSS")
    except OSError:
        return None
    results = list(run())
    return _resident("VmHWM") - before, results


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def _give_back_free_memory() -> None:
    """Freed memory that malloc keeps would be used again without a trace in the resident peak: its pages go back to the system.

    malloc_trim does that for all but the last free piece of a thread's own heap. A thread that ends leaves its heap to a later one, so
    as many threads as malloc has heaps each take the free memory of one and give the pages back.
    """
    empty_cache()
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return
    heaps = 8 * (os.cpu_count() or 1)
    barrier = threading.Barrier(heaps)
    with ThreadPoolExecutor(heaps) as threads:
        list(threads.map(lambda _: _empty_own_heap(libc, barrier), range(heaps)))
    libc.malloc_trim(0)


def _empty_own_heap(libc: ctypes.CDLL, barrier: threading.Barrier) -> None:
    size, page = 120 << 10, mmap.PAGESIZE  # below the least size that malloc takes from the system directly
    libc.malloc.restype = ctypes.c_void_p
    barrier.wait()
    blocks = [libc.malloc(size) for _ in range((64 << 20) // size)]  # a heap has 64 MB
    for block in filter(None, blocks):
        begin = -(-block // page) * page
        libc.madvise(ctypes.c_void_p(begin), (block + size - begin) // page * page, mmap.MADV_DONTNEED)
    barrier.wait()
    for block in blocks:
        libc.free(ctypes.c_void_p(block))
