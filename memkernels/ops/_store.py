"""What the ops of the key-value store's table check."""

from __future__ import annotations

from typing import NamedTuple

import torch

from memkernels._checks import check_tensor, fail

PLACES, WORDS = 5, 8  # places of a bucket, and its int64 words: backends/reference/_store_bucket.py
MOST_ROW = (1 << 34) - 1
BYTE_KEYS = "Tensor? spans, Tensor? arena, Tensor? data, Tensor? offsets, Tensor? second"  # of a schema


class ByteKeys(NamedTuple):
    """What byte keys are compared with: those of the table (`spans`, `arena`) and those of the batch (`data`, `offsets`).

    The row of a place is the number of an entry. spans "E 2" hold its key, which is ``arena[begin:begin + length]`` (uint8), as
    ``begin << 24 | length``, and the second half of its hash. Key i of the batch is ``data[offsets[i]:offsets[i + 1]]``, `second[i]` that
    half.
    """

    spans: torch.Tensor
    arena: torch.Tensor
    data: torch.Tensor
    offsets: torch.Tensor
    second: torch.Tensor


def check_table(op: str, table: torch.Tensor, name: str = "table") -> None:
    check_ints(op, name, table, 2)
    if table.shape[1] != WORDS or not table.is_contiguous():
        fail(op, name, "a contiguous tensor [buckets, 8]", f"shape {tuple(table.shape)}, strides {table.stride()}")


def check_ints(op: str, name: str, got: torch.Tensor, dims: int, count: int | None = None, dtype: torch.dtype = torch.int64) -> None:
    """A tensor of `dims` dimensions, `count` elements long, int64 unless `dtype` says otherwise."""
    check_tensor(op, name, got)
    if got.dtype != dtype:
        fail(op, name, str(dtype).removeprefix("torch."), str(got.dtype).removeprefix("torch."), TypeError)
    if got.dim() != dims or (count is not None and got.shape[0] < count):
        fail(op, name, f"{dims} dimensions" + (f" of at least {count} elements" if count is not None else ""), f"shape {tuple(got.shape)}")


def bounds(rows: torch.Tensor) -> tuple[int, int]:
    """The least and the greatest. Of a few: calls of torch take longer than a loop."""
    if rows.shape[0] <= 16:
        few = rows.tolist()
        return min(few), max(few)
    low, high = torch.aminmax(rows)
    return int(low), int(high)


def check_batch(op: str, table: torch.Tensor, keys: torch.Tensor, byte_keys: ByteKeys | None) -> tuple[torch.Tensor | None, ...]:
    """Checks the table, the keys and their bytes; the flat arguments after them."""
    check_table(op, table)
    check_ints(op, "keys", keys, 1)
    if keys.device != table.device:
        fail(op, "keys", f"device {table.device}", f"device {keys.device}")
    if table.shape[0] == 0:
        fail(op, "table", "at least one bucket", "none")
    if byte_keys is None:
        return None, None, None, None, None
    check_ints(op, "spans", byte_keys.spans, 2)
    check_ints(op, "arena", byte_keys.arena, 1, dtype=torch.uint8)
    check_ints(op, "data", byte_keys.data, 1, dtype=torch.uint8)
    check_ints(op, "offsets", byte_keys.offsets, 1, keys.shape[0] + 1)
    check_ints(op, "second", byte_keys.second, 1, keys.shape[0])
    spans, arena, data, offsets, second = byte_keys
    return spans.contiguous(), arena.contiguous(), data.contiguous(), offsets.contiguous(), second.contiguous()
