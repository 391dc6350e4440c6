"""Everything the package reads from the environment."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def forced_backend() -> str | None:
    """MEMKERNELS_BACKEND: the backend every op must use, or None."""
    return os.environ.get("MEMKERNELS_BACKEND") or None


def cpu_level() -> str | None:
    """MEMKERNELS_CPU_LEVEL: the highest instruction-set level the C++ kernels may use, or None."""
    return os.environ.get("MEMKERNELS_CPU_LEVEL") or None


# What a container may use, where control groups say it: of version 2, then of version 1.
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def kept_memory() -> int | None:
    """MEMKERNELS_KEEP_MB: how many bytes of large CPU outputs that are gone stay in use for later ones. Else a sixteenth of what a
    container may use; None where there is no such limit."""
    text = os.environ.get("MEMKERNELS_KEEP_MB")
    if text and not text.isdecimal():
        raise ValueError(f"MEMKERNELS_KEEP_MB: expected a whole number of megabytes, 0 or more, got {text!r}")
    if text:
        return min(int(text), 1 << 40) << 20
    for file in CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            return min(int(file.read_text()), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) // 16
    return None


def triton_interpret() -> bool:
    """TRITON_INTERPRET: Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def omp_proc_bind() -> str:
    """OMP_PROC_BIND: whether OpenMP ties its threads to cores; read by OpenMP when torch is loaded. Empty when it is not set."""
    return os.environ.get("OMP_PROC_BIND", "")
