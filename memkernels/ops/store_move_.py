"""Move a run of buckets of a hash table into a larger one."""

from __future__ import annotations

import torch

from memkernels._checks import fail
from memkernels._registry import define_table_op
from memkernels.ops._store import check_table


def store_move_(old: torch.Tensor, table: torch.Tensor, begin: int = 0, end: int | None = None) -> torch.Tensor:
    """Move what lies in some buckets of one hash table of a key-value store into another, in place; none of these keys may be there.

    Formula:
        ``store_upsert_(table, *store_items(old, begin, end), "insert")``, then the buckets of `old` are wiped; where `end` is its last
        bucket, all of `old` is zeros after, else keys of these buckets that lie further on are still found.

    Args:
        old, table: "buckets 8", int64, contiguous, on one device; `table` has room for the keys. begin, end: the buckets of `old` to move.

    Returns:
        moved: "1", int64: how many keys lay in these buckets.

    Gradients:
        None.

    Numerics:
        Exact; both tables are the same, byte for byte, for every backend and number of threads. Byte keys are moved by the 64 bits of
        their hash; their entries stay.

    Raises:
        TypeError: a dtype differs. ValueError: a shape or device differs, the same memory twice, or a bucket that `old` does not have.

    Source:
        As `store_find`.

    Example:
        >>> import torch
        >>> from memkernels.ops import store_find, store_move_, store_upsert_
        >>> old, table = torch.zeros(4, 8, dtype=torch.int64), torch.zeros(9, 8, dtype=torch.int64)
        >>> _ = store_upsert_(old, torch.tensor([7, 8]), torch.tensor([10, 11]))
        >>> store_move_(old, table), store_find(table, torch.tensor([8])), bool(old.any())
        (tensor([2]), tensor([11]), False)
    """
    check_table("store_move_", old, "old")
    check_table("store_move_", table)
    if table.shape[0] == 0:
        fail("store_move_", "table", "at least one bucket", "none")
    if old.device != table.device:
        fail("store_move_", "old", f"device {table.device}", f"device {old.device}")
    if old.data_ptr() == table.data_ptr():
        fail("store_move_", "table", "another table than old", "the same")
    end = old.shape[0] if end is None else end
    if not 0 <= begin <= end <= old.shape[0]:
        fail("store_move_", "begin, end", f"0 <= begin <= end <= {old.shape[0]}", f"{begin}, {end}")
    return OP(old, table, begin, end)[0]


def _allocate(old, table, begin, end):
    return (old.new_empty(1),)


OP = define_table_op("store_move_", "(Tensor(a!) old, Tensor(b!) table, int begin, int end) -> Tensor[]", _allocate)
