"""Memory that was given back to the C library, which hands it out again without having overwritten it."""

from __future__ import annotations

import ctypes
import gc
import mmap

from memkernels._backends import empty_cache

# A request of half the size takes what is left of any free piece; small pieces are kept by their exact size, in steps of 16 bytes.
_SIZES = [*(1 << power for power in range(26, 9, -1)), *range(1008, 8, -16)]


def wipe_freed() -> None:
    """Overwrites what calls that are over have left in free memory: batches of keys, rows on their way, pages of the engine.

    Whole pages go back to the system, for every heap; the pieces between them are asked for, filled with zeros and given back, for the
    heap of the main thread. Only glibc is known well enough for that. Out of reach: the caller's own objects, small objects of Python's
    (keys as bytes or str), and the small pieces of other threads' heaps.
    """
    gc.collect()  # what only garbage refers to
    empty_cache()
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim") or not hasattr(libc, "sbrk"):
        return
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.sbrk.argtypes = [ctypes.c_size_t], [ctypes.c_ssize_t]
    libc.free.argtypes = libc.malloc_usable_size.argtypes = [ctypes.c_void_p]
    libc.malloc_usable_size.restype = ctypes.c_size_t
    libc.malloc_trim(0)
    end, held = libc.sbrk(0) or 0, []  # of the heap: what lies behind it is new
    for size in _SIZES:
        while block := libc.malloc(size):
            held.append(block)
            usable = libc.malloc_usable_size(block)
            ctypes.memset(block, 0, min(usable, 2 * mmap.PAGESIZE))  # behind its first whole page a free piece is empty since the trim
            if usable > 2 * mmap.PAGESIZE:
                ctypes.memset(block + usable - mmap.PAGESIZE, 0, mmap.PAGESIZE)
            if block + usable >= end:
                break
    for block in held:
        libc.free(block)
    libc.malloc_trim(0)
