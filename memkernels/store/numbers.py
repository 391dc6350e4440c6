"""Who hands out row numbers."""

from __future__ import annotations

import torch


class RowNumbers:
    """Numbers from 0 on, given out in order; freed ones first, the last freed first."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.end = 0  # every number below has been given out
        self._free, self._freed = torch.empty(0, dtype=torch.int64, device=device), 0

    @property
    def free(self) -> torch.Tensor:
        """The freed numbers, the next one to be given out last."""
        return self._free[: self._freed]

    @property
    def in_use(self) -> int:
        return self.end - self._freed

    def peek(self, count: int) -> torch.Tensor:
        """The next `count` numbers; `use` says how many of them were taken."""
        if not self._freed:
            return torch.arange(self.end, self.end + count, device=self._free.device)
        reused = self.free[max(0, self._freed - count) :].flip(0)
        fresh = torch.arange(self.end, self.end + count - reused.shape[0], device=self._free.device)
        return torch.cat([reused, fresh]) if reused.shape[0] else fresh

    def use(self, count: int) -> None:
        reused = min(count, self._freed)
        self._freed -= reused
        self.end += count - reused

    def give_back(self, numbers: torch.Tensor) -> None:
        need = self._freed + numbers.shape[0]
        if need > self._free.shape[0]:
            grown = self._free.new_empty(max(need, 2 * self._free.shape[0], 64))
            grown[: self._freed] = self.free
            self._free = grown
        self._free[self._freed : need] = numbers
        self._freed = need

    @property
    def nbytes(self) -> int:
        return self._free.nbytes
