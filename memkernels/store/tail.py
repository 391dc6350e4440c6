"""What was appended to a log and not committed yet."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from memkernels.store.keys import KeyBatch
from memkernels.store.runs import ERASED, PIECE, Run, pieces
from memkernels.store.segments import Segments


class Tail:
    """Rows beyond the last commit, in the segments, and the runs that will say whose they are."""

    def __init__(self, segments: Segments, rows: int) -> None:
        self._segments, self.rows = segments, rows
        self.runs: list[Run] = []

    def append(self, keys: KeyBatch, values: dict[str, Tensor]) -> int:
        """The row of the first key; when it raises, as if it had not been called."""
        row, plan = self.rows, []
        for low, high, part in pieces(keys):
            run = self._run() if low == 0 else Run(keys.type)
            before = run.blocks[-1:]
            blocks = self._segments.write(row, {name: value[low:high] for name, value in values.items()}, before)
            plan.append((run, part, row, len(before), blocks))
            row += high - low
        for run, part, first, replaced, blocks in plan:
            if not run.blocks:
                run.first_row = first
            run.blocks[len(run.blocks) - replaced :] = blocks
            self._add(run, part, first)
        first, self.rows = self.rows, row
        return first

    def forget(self, keys: KeyBatch) -> None:
        for low, _, part in pieces(keys):
            self._add(self._run() if low == 0 else Run(keys.type), part, ERASED)

    def mark(self) -> tuple[Any, ...]:
        """What `back_to` takes."""
        return self.rows, len(self.runs), self.runs[-1].mark() if self.runs else None

    def back_to(self, mark: tuple[Any, ...]) -> None:
        """Drops what came since `mark` was asked for; no `take` in between."""
        self.rows, count, last = mark
        del self.runs[count:]
        if last is not None:
            self.runs[-1].back_to(last)

    def take(self) -> list[Run]:
        runs, self.runs = self.runs, []
        return runs

    def _run(self) -> Run:
        """The run that is being filled."""
        full = not self.runs or self.runs[-1].key_bytes >= PIECE
        return Run(self._segments.schema.key_type) if full else self.runs[-1]

    def _add(self, run: Run, keys: KeyBatch, first: int) -> None:
        run.add(keys, first)
        if not self.runs or self.runs[-1] is not run:
            self.runs.append(run)
