"""Rows of a memory named by an index: the check that ops with such an argument share."""

from __future__ import annotations

import torch

from memkernels import _compat
from memkernels._checks import fail


def check_index(op: str, index: torch.Tensor, rows: int, letter: str) -> None:
    """-1 or a row. Reads the values only where that is free: on a CPU, outside of transforms and tracing; C++ kernels look in any case."""
    if not torch.compiler.is_compiling() and _compat.integers_fit(index, -1, rows - 1, _compat.ANY) is False:
        low, high = (int(end) for end in torch.aminmax(index))
        fail(op, "index", f"-1 or rows 0 to {letter}-1={rows - 1}", f"{low} to {high}", IndexError)
