"""Rows of a memory named by an index: the check that ops with such an argument share."""

from __future__ import annotations

import torch

from memkernels._checks import fail
from memkernels._compat import plain_call

_SERIAL = 1 << 14  # elements that torch goes over without its threads, for which a forked child would wait for ever


def check_index(op: str, index: torch.Tensor, rows: int, letter: str) -> None:
    """-1 or a row. Reads the values only where that is free: on a CPU, outside of transforms and tracing; C++ kernels look in any case."""
    if torch.compiler.is_compiling() or index.device.type != "cpu" or not plain_call((index,)) or not index.numel():
        return
    for piece in index.reshape(-1).split(_SERIAL):
        low, high = int(piece.min()), int(piece.max())  # a fifth of the time of aminmax
        if low < -1 or high >= rows:
            fail(op, "index", f"-1 or rows 0 to {letter}-1={rows - 1}", f"{low} to {high}", IndexError)
