"""Which rows of a memory a layer read and wrote."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memkernels._compat import register_namedtuple


class Trace(NamedTuple):
    """Which rows a call read and wrote at each step, and how much: "T B ...", or "B T ..." with `batch_first`.

    `read`: weights "T B R N"; in `ExternalMemory`'s modes "topk", "product" and "store" (k = 1) "T B R k", of the rows int64 "T B R k",
    of which -1 is absent. `write`: weights "T B H N". `rows`: None where all rows are read.
    """

    read: Tensor
    write: Tensor
    rows: Tensor | None = None


class SparseTrace(NamedTuple):
    """Which few rows a call read and wrote at each step, and how much: "T B ...", or "B T ..." with `batch_first`.

    `read`: weights "T B R k" of the rows int64 `rows`; `write`: weights "T B R k+1" of the rows int64 `write_rows`.
    """

    read: Tensor
    rows: Tensor
    write: Tensor
    write_rows: Tensor


register_namedtuple(Trace)
register_namedtuple(SparseTrace)


def stacked(steps: list[Tensor], nothing: Tensor) -> Tensor:
    """ "T ..." of what each step gave; `nothing` where there was none."""
    return torch.stack(steps) if steps else nothing
