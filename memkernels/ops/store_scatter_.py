"""Write rows of chunked storage."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memkernels._registry import define_table_op
from memkernels.ops._store import check_ints
from memkernels.ops.store_gather import check_chunks


def store_scatter_(chunks: Sequence[torch.Tensor], firsts: Sequence[int], rows: torch.Tensor, values: torch.Tensor) -> None:
    """Write rows of values that lie in several chunks, as bytes, in place; of equal rows the last one stays, a negative row is left out.

    Formula:
        ``chunks[c][rows[i] - firsts[c]] = values[i]`` of the chunk c that holds the row

    Args:
        chunks: tensors "rows bytes", uint8, their rows of any stride, bytes one after another. firsts: the first row of each, increasing.
        rows: "n", int64.
        values: "n bytes", uint8.

    Raises:
        IndexError: a row that no chunk holds; nothing is written. TypeError, ValueError: dtypes or shapes differ.

    Example:
        >>> import torch
        >>> from memkernels.ops import store_scatter_
        >>> chunk, values = torch.zeros(3, 2, dtype=torch.uint8), torch.arange(4, dtype=torch.uint8).view(2, 2)
        >>> store_scatter_([chunk], [0], torch.tensor([1, 1]), values)
        >>> chunk.tolist()
        [[0, 0], [2, 3], [0, 0]]
    """
    check_ints("store_scatter_", "values", values, 2, rows.shape[0], torch.uint8)
    check_chunks("store_scatter_", chunks, firsts, rows, values.shape[1])
    if rows.numel():
        OP(list(chunks), list(firsts), rows.contiguous(), values.contiguous())


OP = define_table_op("store_scatter_", "(Tensor(a!)[] chunks, int[] firsts, Tensor rows, Tensor values) -> Tensor[]", lambda *args: ())
