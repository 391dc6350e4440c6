"""What lies in a run of buckets of a hash table."""

from __future__ import annotations

import torch

from memkernels._checks import fail
from memkernels._registry import define_table_op
from memkernels.ops._store import PLACES, check_table


def store_items(table: torch.Tensor, begin: int = 0, end: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and rows in some buckets of the hash table of a key-value store, in the order of the table.

    Args:
        table: "buckets 8", int64, contiguous. begin, end: the buckets to read.

    Returns:
        keys, rows: "m", int64.

    Raises:
        TypeError: a dtype differs. ValueError: a shape differs, or a bucket that the table does not have.

    Example:
        >>> import torch
        >>> from memkernels.ops import store_items, store_upsert_
        >>> table = torch.zeros(4, 8, dtype=torch.int64)
        >>> _ = store_upsert_(table, torch.tensor([7]), torch.tensor([10]))
        >>> store_items(table)
        (tensor([7]), tensor([10]))
    """
    check_table("store_items", table)
    end = table.shape[0] if end is None else end
    if not 0 <= begin <= end <= table.shape[0]:
        fail("store_items", "begin, end", f"0 <= begin <= end <= {table.shape[0]}", f"{begin}, {end}")
    keys, rows, count = OP(table, begin, end)
    return keys[: int(count)], rows[: int(count)]


def _allocate(table, begin, end):
    most = PLACES * (end - begin)
    return table.new_empty(most), table.new_empty(most), table.new_empty(1)


OP = define_table_op("store_items", "(Tensor table, int begin, int end) -> Tensor[]", _allocate)
