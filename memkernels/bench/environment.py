"""What a measurement depends on: versions, machine, commit, and the machine's own ceilings measured in the same process."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

import memkernels
from memkernels import _config


def _git(*arguments: str) -> str:
    folder = Path(memkernels.__file__).resolve().parent.parent
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def cpu_model() -> str:
    """The processor's name, as Linux reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    features = next((line for line in lines if line.startswith("flags")), "")
    extras = [name for name in ("avx2", "avx512f", "amx_bf16") if f" {name}" in features]
    return f"{names[0] if names else platform.machine()} ({len(names)} cores, {', '.join(extras)})"


def environment(device: str = "cpu") -> dict[str, Any]:
    """Everything needed to read a result later: date, commit, versions, machine, threads, ceilings."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(changed),
        "memkernels": getattr(memkernels, "__version__", ""),
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cpu_level": memkernels.cpu_level(),
        "threads": torch.get_num_threads(),
        "omp_proc_bind": _config.omp_proc_bind(),
        "load": round(os.getloadavg()[0], 1),  # what else ran: above the number of threads the times are not this machine's best
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "ceilings": ceilings(device, torch.get_num_threads()),
    }


def binding_note() -> str:
    """What to tell a reader of CPU times when threads may move between cores, else an empty text."""
    if torch.get_num_threads() == 1 or _config.omp_proc_bind().lower() not in ("", "false"):
        return ""
    return "note: OMP_PROC_BIND=true is not set, so threads may share a core for a whole run and every time, the peers' too, doubles"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _fastest(call: Callable[[], Any], device: str, repeats: int = 7) -> float:
    times = []
    call()
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times)


# Bytes: no last-level cache of this size keeps them from one call to the next.
_NOT_IN_A_CACHE = 1 << 28


@cache
def ceilings(device: str, threads: int) -> dict[str, float]:
    """Measured ceilings: copy (read + write) and read bandwidth in GB/s, matrix product rate per dtype in GFLOP/s.

    read_gb_s is of 128 MiB on a CPU, which the last-level cache of a server may hold, memory_read_gb_s of 1 GiB.
    """
    n = 1 << (28 if device == "cuda" else 25)
    source, target = torch.rand(n, device=device), torch.empty(n, device=device)
    found = {"copy_gb_s": 8e-9 * n / _fastest(lambda: target.copy_(source), device)}
    found["read_gb_s"] = 4e-9 * n / _fastest(lambda: torch.dot(source, source), device)
    large = source if device == "cuda" else torch.ones(1 << 28)
    found["memory_read_gb_s"] = 4e-9 * len(large) / _fastest(lambda: torch.dot(large, large), device)
    size = 8192 if device == "cuda" else 1024
    for dtype in (torch.float32, torch.bfloat16, torch.float16) + ((torch.float64,) if device == "cpu" else ()):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[f"{str(dtype).removeprefix('torch.')}_gflop_s"] = 2e-9 * size**3 / _fastest(lambda a=a, b=b: a @ b, device, 5)  # type: ignore[misc]
    return found


def floor_seconds(moved: float, flops: float, dtype: torch.dtype, device: str) -> float:
    """The least time for these bytes and operations at this machine's measured ceilings."""
    found = ceilings(device, torch.get_num_threads())
    bandwidth = max(found["copy_gb_s"], found["read_gb_s" if moved < _NOT_IN_A_CACHE else "memory_read_gb_s"])
    rate = found.get(f"{str(dtype).removeprefix('torch.')}_gflop_s", found["float32_gflop_s"])
    return max(moved / bandwidth, flops / rate) * 1e-9
