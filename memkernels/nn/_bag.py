"""The weighted sum of table rows that memory modules read with."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def weighted_bag(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Sums of rows: table "K D", index int64 "B J", weight "B J" -> "B D"."""
    return F.embedding_bag(index, table, mode="sum", per_sample_weights=weight.to(table.dtype))
