"""Rows of chunked storage."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memkernels._checks import check_tensor, fail
from memkernels._registry import define_table_op, new_empty
from memkernels.ops._store import check_ints


def store_gather(chunks: Sequence[torch.Tensor], firsts: Sequence[int], rows: torch.Tensor, default: torch.Tensor) -> torch.Tensor:
    """Rows of values that lie in several chunks, as bytes.

    Formula:
        ``out[i] = chunks[c][rows[i] - firsts[c]]`` of the chunk c that holds the row; ``default[0]`` where rows[i] < 0

    Args:
        chunks: tensors "rows bytes", uint8, their rows of any stride, bytes one after another. firsts: the first row of each, increasing.
        rows: "n", int64.
        default: "1 bytes", uint8, contiguous.

    Returns:
        out: "n bytes", uint8, contiguous.

    Raises:
        IndexError: a row that no chunk holds. TypeError, ValueError: dtypes or shapes differ.

    Example:
        >>> import torch
        >>> from memkernels.ops import store_gather
        >>> chunk = torch.arange(6, dtype=torch.uint8).view(3, 2)
        >>> store_gather([chunk, chunk], [0, 3], torch.tensor([4, -1]), torch.full((1, 2), 9, dtype=torch.uint8)).tolist()
        [[2, 3], [9, 9]]
    """
    check_ints("store_gather", "default", default, 2, 1, torch.uint8)
    check_chunks("store_gather", chunks, firsts, rows, default.shape[1])
    (out,) = OP([*chunks, default], list(firsts), rows.contiguous())
    return out


def check_chunks(op: str, chunks: Sequence[torch.Tensor], firsts: Sequence[int], rows: torch.Tensor, width: int) -> None:
    """Every chunk is uint8 "rows width" with bytes in a run, one first row for each."""
    check_ints(op, "rows", rows, 1)
    if len(chunks) != len(firsts):
        fail(op, "firsts", f"{len(chunks)} numbers, one for each chunk", str(len(firsts)))
    for i, chunk in enumerate(chunks):
        check_tensor(op, f"chunks[{i}]", chunk)
        if chunk.dtype != torch.uint8 or chunk.dim() != 2 or chunk.shape[1] != width or (width > 1 and chunk.stride(1) != 1):
            got = f"{str(chunk.dtype).removeprefix('torch.')} {tuple(chunk.shape)} with strides {chunk.stride()}"
            fail(op, f"chunks[{i}]", f"uint8 [rows, {width}] with bytes in a run", got)


def _allocate(chunks, firsts, rows):
    return (new_empty(chunks[-1], (rows.shape[0], chunks[-1].shape[1])),)


OP = define_table_op("store_gather", "(Tensor[] chunks, int[] firsts, Tensor rows) -> Tensor[]", _allocate)
