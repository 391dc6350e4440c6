"""Inputs and upstream gradients with rows more than 2^31 elements apart, in 2^32 that stay untouched: no 32-bit offset survives."""

from __future__ import annotations

import itertools
import mmap
from functools import cache

import pytest
import torch
from cases import Case, select

from memkernels.testing import compare, inputs
from memkernels.testing.spec import Tensors

ELEMENTS = 2**32
MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.11 on


@cache
def space(dtype: torch.dtype, slot: str) -> torch.Tensor:
    """Zeros that take memory only where they are written; unreserved, or the 32 GiB of int64 beside those of other dtypes are refused."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, ELEMENTS * dtype.itemsize, flags=flags), dtype=dtype)


def far(t: torch.Tensor, axis: int, place: str, slot: str) -> torch.Tensor:
    """A copy of `t`, in the space of that slot, whose slices along `axis` are 2^31 elements apart from first to last.

    At the "end" of the space a wrapped offset leaves it; in the "middle" it reads other memory, zeros. Where `t` has not two slices
    along the axis, it comes back as it is.
    """
    if axis >= t.ndim or t.shape[axis] < 2 or not t.numel():
        return t
    stride = [*t.contiguous().stride()]
    stride[axis] = 2**31 // (t.shape[axis] - 1) + 64
    extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, stride))
    offset = 0 if place == "end" else ELEMENTS - extent
    view = space(t.dtype, slot).as_strided(t.shape, stride, offset)
    return view.copy_(t)


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], what: str) -> None:
    for name in wanted:
        torch.testing.assert_close(
            found[name], wanted[name], rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda text, name=name: f"{what}: {name}: {text}"
        )


def check_far_apart(case: Case) -> None:
    """All inputs and upstream gradients at once, along every axis, give what the compact ones give."""
    given = case.inputs()
    wanted = case.evaluate(given)
    deepest = max(t.ndim for t in (*wanted.values(), *given.values()) if t is not None)
    for axis, place in itertools.product(range(deepest), ("end", "middle")):
        print(case, axis, place, flush=True)
        assert_close(_evaluate_far(case, given, axis, place), wanted, f"rows far apart along axis {axis}")


def _evaluate_far(case: Case, given: Tensors, axis: int, place: str) -> dict[str, torch.Tensor]:
    def upstream(outputs):
        compact = inputs.upstream(outputs, case.dtype)
        return [None if g is None else far(g, axis, place, f"upstream {i}") for i, g in enumerate(compact)]

    spread = {name: None if t is None else far(t, axis, place, name) for name, t in given.items()}
    with compare.using(case.backend):
        return compare.evaluate(case.spec, spread, case.options, upstream)


def run_all(backend: str, first: int | None) -> None:
    count = 0
    for parameter in select(dtypes=(torch.float32,), levels="all", kernels_only=True, empty=False, hard=False, first=first):
        case, waits = parameter.values[0], first is not None and pytest.mark.slow in parameter.marks
        if not waits and case.backend == backend and case.device == "cpu":
            check_far_apart(case)
            count += 1
    print("done", count)
