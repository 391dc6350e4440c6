"""Take keys out of a hash table."""

from __future__ import annotations

import torch

from memkernels._registry import define_table_op
from memkernels.ops._store import BYTE_KEYS, ByteKeys, check_batch


def store_erase_(table: torch.Tensor, keys: torch.Tensor, byte_keys: ByteKeys | None = None) -> torch.Tensor:
    """Take a batch of keys out of the hash table of a key-value store, in place; nothing of them stays in the table.

    Formula:
        one element after the other: ``removed[i] = table[keys[i]] or -1``, and the key is gone

    Args:
        table: "buckets 8", int64, contiguous.
        keys: "n", int64, any value.
        byte_keys: as in `store_find`.

    Returns:
        removed: "n", int64: the row that the key had; -1 where it was not there, so too for the second one of equal keys.

    Gradients:
        None.

    Numerics:
        Exact; the table is the same, byte for byte, for every backend and number of threads. No tombstone is left: the place takes in the
        next key that had to pass its bucket, and so on, so searches are as short as if what is gone had never been there.

    Raises:
        TypeError: a dtype differs. ValueError: a shape or device differs.

    Source:
        As `store_find`.

    Example:
        >>> import torch
        >>> from memkernels.ops import store_erase_, store_upsert_
        >>> table, keys = torch.zeros(4, 8, dtype=torch.int64), torch.tensor([7, -1])
        >>> _ = store_upsert_(table, keys, torch.tensor([10, 11]))
        >>> store_erase_(table, torch.tensor([7, 7, -1])), int(table.abs().sum())
        (tensor([10, -1, 11]), 0)
    """
    flat = check_batch("store_erase_", table, keys, byte_keys)
    (removed,) = OP(table, keys.contiguous(), *flat)
    return removed


def _allocate(table, keys, spans, arena, data, offsets, second):
    return (torch.empty_like(keys),)


OP = define_table_op("store_erase_", f"(Tensor(a!) table, Tensor keys, {BYTE_KEYS}) -> Tensor[]", _allocate)
