"""Inputs and upstream gradients with rows more than 2^31 elements apart, in 2^32 that stay untouched: no 32-bit offset survives."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from functools import cache

import torch
from cases import Case, select

from memkernels.testing import compare, inputs

ELEMENTS = 2**32
MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.11 on


@cache
def space(dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take memory only where they are written; unreserved, or the 32 GiB of int64 beside those of other dtypes are refused."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, ELEMENTS * dtype.itemsize, flags=flags), dtype=dtype)


def far(t: torch.Tensor, axis: int, place: str) -> torch.Tensor:
    """A copy of `t` whose slices along `axis` are 2^31 elements apart from first to last.

    At the "end" of the space a wrapped offset leaves it and the process crashes; in the "middle" it reads other memory, zeros.
    """
    stride = [*t.contiguous().stride()]
    stride[axis] = 2**31 // (t.shape[axis] - 1) + 64
    extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, stride))
    offset = 0 if place == "end" else ELEMENTS - extent
    view = space(t.dtype).as_strided(t.shape, stride, offset)
    return view.copy_(t)


def placements(t: torch.Tensor) -> Iterator[tuple[int, str]]:
    for axis, n in enumerate(t.shape):
        if n > 1 and t.numel():
            yield from ((axis, place) for place in ("end", "middle"))


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], what: str) -> None:
    for name in wanted:
        torch.testing.assert_close(
            found[name], wanted[name], rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda text, name=name: f"{what}: {name}: {text}"
        )


def check_far_apart(case: Case) -> None:
    """Every input and every upstream gradient, along every axis, gives what the compact one gives."""
    given = case.inputs()
    wanted = case.evaluate(given)
    for name, t in given.items():
        for axis, place in placements(t) if t is not None else ():
            print(case, name, axis, place, flush=True)
            assert_close(case.evaluate({**given, name: far(t, axis, place)}), wanted, f"{name} with rows far apart along axis {axis}")

    def evaluate(i: int, axis: int, place: str) -> dict[str, torch.Tensor]:
        def upstream(outputs):
            return [far(g, axis, place) if j == i else g for j, g in enumerate(inputs.upstream(outputs, case.dtype))]

        with compare.using(case.backend):
            return compare.evaluate(case.spec, given, case.options, upstream)

    for i in range(sum(name.startswith("output") for name in wanted)):
        if f"output {i}" in wanted and wanted[f"output {i}"].is_floating_point():
            for axis, place in placements(wanted[f"output {i}"]):
                print(case, f"upstream {i}", axis, place, flush=True)
                assert_close(evaluate(i, axis, place), wanted, f"upstream gradient {i} with rows far apart along axis {axis}")


def run_all(backend: str, first: int | None) -> None:
    count = 0
    for parameter in select(dtypes=(torch.float32,), levels="all", kernels_only=True, empty=False, hard=False, first=first):
        case = parameter.values[0]
        if case.backend == backend and case.device == "cpu":
            check_far_apart(case)
            count += 1
    print("done", count)
