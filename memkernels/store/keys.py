"""A batch of keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class KeyBatch:
    """int64: `ints` "n"; bytes and str: `data` (uint8, all keys' bytes one after another) and `offsets` int64 "n+1"."""

    type: str
    ints: Tensor | None = None
    data: Tensor | None = None
    offsets: Tensor | None = None

    def __len__(self) -> int:
        if self.ints is not None:
            return len(self.ints)
        assert self.offsets is not None
        return len(self.offsets) - 1
