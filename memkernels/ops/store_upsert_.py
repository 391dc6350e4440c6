"""Put keys with their rows into a hash table."""

from __future__ import annotations

import torch

from memkernels._checks import check_choice, fail
from memkernels._registry import define_table_op
from memkernels.ops._store import BYTE_KEYS, MOST_ROW, ByteKeys, bounds, check_batch, check_ints

MODES = ("replace", "keep", "assign", "insert")


def store_upsert_(
    table: torch.Tensor, keys: torch.Tensor, rows: torch.Tensor, mode: str = "replace", byte_keys: ByteKeys | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put a batch of keys into the hash table of a key-value store, in place.

    Formula:
        one element after the other: ``old[i] = table[keys[i]] or -1``; where it is -1, or the mode is "replace", ``table[keys[i]] =
        rows[i]``;
        ``now[i] = table[keys[i]]``

    Args:
        table: "buckets 8", int64, contiguous, with more free places than the batch has new keys.
        keys: "n", int64, any value; of equal ones the last one counts ("replace") or the first one ("keep", "assign").
        rows: "n", int64, 0 to 2^34 - 1.
        mode: "replace"; "keep": keys that are there keep their row; "assign": the same, and new keys get the rows in order: the first
            new key
            of the batch rows[0], the next new one rows[1]; "insert": no key of the batch is there nor comes twice, so none is looked up.
        byte_keys: as in `store_find`; needed for byte keys with "assign".

    Returns:
        now: "n", int64: the row of the key after this element. old: "n", int64: its row before this element, -1 where it was not there,
            -2 where the table is full and the key was left out.

    Gradients:
        None.

    Numerics:
        Exact; the table is the same, byte for byte, for every backend and number of threads.

    Raises:
        TypeError: a dtype differs. ValueError: a shape or device differs, a row is out of range, an unknown mode.

    Source:
        As `store_find`.

    Example:
        >>> import torch
        >>> from memkernels.ops import store_upsert_
        >>> table = torch.zeros(4, 8, dtype=torch.int64)
        >>> store_upsert_(table, torch.tensor([5, 6, 5]), torch.tensor([0, 1, 2]), "assign")
        (tensor([0, 1, 0]), tensor([-1, -1,  0]))
    """
    flat = check_batch("store_upsert_", table, keys, byte_keys)
    check_ints("store_upsert_", "rows", rows, 1, keys.shape[0])
    check_choice("store_upsert_", "mode", mode, MODES)
    if byte_keys is not None and mode != "assign":
        fail("store_upsert_", "mode", "'assign' where byte_keys are given", repr(mode))
    if rows.device != table.device:
        fail("store_upsert_", "rows", f"device {table.device}", f"device {rows.device}")
    if rows.numel() and not torch.compiler.is_compiling():
        low, high = bounds(rows)
        if low < 0 or high > MOST_ROW:
            fail("store_upsert_", "rows", f"rows from 0 to {MOST_ROW}", f"{low} to {high}")
    now, old = OP(table, keys.contiguous(), rows.contiguous(), mode, *flat)
    return now, old


def _allocate(table, keys, rows, mode, spans, arena, data, offsets, second):
    return torch.empty_like(keys), torch.empty_like(keys)


OP = define_table_op(
    "store_upsert_",
    f"(Tensor(a!) table, Tensor keys, Tensor rows, str mode, {BYTE_KEYS}) -> Tensor[]",
    _allocate,
)
