"""Everything the package reads from the environment."""

from __future__ import annotations

import os


def forced_backend() -> str | None:
    """MEMKERNELS_BACKEND: the backend every op must use, or None."""
    return os.environ.get("MEMKERNELS_BACKEND") or None


def cpu_level() -> str | None:
    """MEMKERNELS_CPU_LEVEL: the highest instruction-set level the C++ kernels may use, or None."""
    return os.environ.get("MEMKERNELS_CPU_LEVEL") or None


def kept_memory() -> int | None:
    """MEMKERNELS_KEEP_MB: how many MB of large CPU outputs that are gone stay in use for later ones, in bytes; None: the default."""
    text = os.environ.get("MEMKERNELS_KEEP_MB")
    if not text:
        return None
    if not text.isdecimal():
        raise ValueError(f"MEMKERNELS_KEEP_MB: expected a whole number of megabytes, 0 or more, got {text!r}")
    return int(text) << 20


def triton_interpret() -> bool:
    """TRITON_INTERPRET: Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def omp_proc_bind() -> str:
    """OMP_PROC_BIND: whether OpenMP ties its threads to cores; read by OpenMP when torch is loaded. Empty when it is not set."""
    return os.environ.get("OMP_PROC_BIND", "")
