"""Rows of keys in a hash table."""

from __future__ import annotations

import torch

from memkernels._registry import define_table_op
from memkernels.ops._store import BYTE_KEYS, ByteKeys, check_batch


def store_find(table: torch.Tensor, keys: torch.Tensor, byte_keys: ByteKeys | None = None) -> torch.Tensor:
    """Look up a batch of keys in the hash table of a key-value store.

    Formula:
        ``rows[i] = the row that the table holds for keys[i], or -1``

    Args:
        table: "buckets 8", int64, contiguous; zeros are an empty table. One bucket is one cache line: five keys, their rows, how many
            keys passed it when it was full and of which of six kinds they were. What writes it is `store_upsert_` and `store_erase_`.
        keys: "n", int64, any value.
        byte_keys: for byte keys, of which `keys` are then 64 bits of a hash: 64 bits more and the bytes, to compare where those agree.

    Returns:
        rows: "n", int64.

    Gradients:
        None.

    Numerics:
        Exact; the same for every backend, batch and number of threads.

    Raises:
        TypeError: a dtype differs. ValueError: a shape or device differs.

    Source:
        Open addressing with buckets (Knuth, The Art of Computer Programming 3, 6.4), with his algorithm R for keys that are erased.

    Example:
        >>> import torch
        >>> from memkernels.ops import store_find, store_upsert_
        >>> table, keys = torch.zeros(4, 8, dtype=torch.int64), torch.tensor([7, -1, 7])
        >>> _ = store_upsert_(table, keys, torch.tensor([10, 11, 12]))
        >>> store_find(table, torch.tensor([-1, 7, 0]))
        tensor([11, 12, -1])
    """
    flat = check_batch("store_find", table, keys, byte_keys)
    (rows,) = OP(table, keys.contiguous(), *flat)
    return rows


def _allocate(table, keys, spans, arena, data, offsets, second):
    return (torch.empty_like(keys),)


OP = define_table_op("store_find", f"(Tensor table, Tensor keys, {BYTE_KEYS}) -> Tensor[]", _allocate)
