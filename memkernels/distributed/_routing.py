"""Which rank owns a key, and rows of keys and values on their way there and back."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from memkernels.store import KeyBatch
from memkernels.store.columns import Columns, as_bytes, from_bytes, row_bytes
from memkernels.store.keys import offsets_of

_STEP, _MIX = -0x61C8864680B583EB, -0x3B314601E57A13AD  # 2^64 / golden ratio, and splitmix64's second factor, as signed numbers

HEAD = ""  # the column of what each key is or how long it is; no store has one of this name


def owners(batch: KeyBatch, ranks: int) -> torch.Tensor:
    """The rank of each key, int64 "n": a function of the key and the number of ranks alone. Part of the format on disk.

    Mixed once more, because a rank's own table goes by the same hash: all its keys would otherwise share some bits of it.
    """
    mixed = batch.owner_hashes() * _STEP
    mixed = (mixed ^ (mixed >> 29)) * _MIX
    return ((mixed >> 33) & 0x7FFFFFFF) % ranks


class Route:
    """The way of one batch: row i of this rank goes to `owners(i)`; what arrives is ordered by rank and, in a rank, by place.

    Args:
        batch: this rank's keys. ranks: of the group. device: of what is sent.
    """

    def __init__(self, batch: KeyBatch, ranks: int, device: torch.device) -> None:
        owner = owners(batch, ranks)
        self.order = torch.sort(owner, stable=True).indices
        self.batch, self.device, self.type = batch.select(self.order), device, batch.type
        rows = torch.bincount(owner, minlength=ranks)
        # Rows and, for keys of bytes, how many bytes of them, to each rank.
        self.rows = [int(n) for n in rows]
        self.bytes = [0] * ranks
        if batch.ints is None:
            self.bytes = [int(part.sum()) for part in self.batch.lengths().split(self.rows)]
        self.arriving: list[int] = []
        self.arriving_bytes: list[int] = []

    def expect(self, rows: list[int], sizes: list[int]) -> None:
        """What comes from each rank, as they told."""
        self.arriving, self.arriving_bytes = rows, sizes

    def arrived(self, values: dict[str, torch.Tensor], columns: Columns, group: Any) -> tuple[KeyBatch, dict[str, torch.Tensor]]:
        """The keys and rows that arrive: one message, and one more for keys of bytes."""
        order, batch = self.order.to(self.device), self.batch
        head = batch.ints if batch.ints is not None else batch.lengths()
        given = {HEAD: head.to(self.device), **{name: t.to(self.device)[order] for name, t in values.items()}}
        kinds = {HEAD: ((), torch.int64), **columns}
        found = _unpacked(_exchanged(_packed(given, kinds), self.rows, self.arriving, group), kinds)
        head = found.pop(HEAD)
        if batch.data is None:
            return KeyBatch(self.type, head), found
        data = _exchanged(batch.data.to(self.device), self.bytes, self.arriving_bytes, group)
        return KeyBatch(self.type, None, data.cpu(), offsets_of(head.cpu())), found

    def answers(self, answers: dict[str, torch.Tensor], columns: Columns, group: Any) -> dict[str, torch.Tensor]:
        """What the owners answer to each row that arrived there, in the order in which this rank asked."""
        back = _exchanged(_packed({name: t.to(self.device) for name, t in answers.items()}, columns), self.arriving, self.rows, group)
        asked = torch.empty_like(back)
        asked[self.order.to(self.device)] = back
        return _unpacked(asked, columns)


def _exchanged(rows: torch.Tensor, outgoing: list[int], arriving: list[int], group: Any) -> torch.Tensor:
    """The first outgoing[0] rows go to rank 0 and so on; what arrives, in rank order."""
    found = rows.new_empty(sum(arriving), *rows.shape[1:])
    dist.all_to_all_single(found, rows.contiguous(), arriving, outgoing, group=group)
    return found


def _packed(values: dict[str, torch.Tensor], columns: Columns) -> torch.Tensor:
    """All columns of a row side by side: one message, whatever their dtypes."""
    return torch.cat([as_bytes(values[name], row_bytes(*column)) for name, column in columns.items()], 1)


def _unpacked(rows: torch.Tensor, columns: Columns) -> dict[str, torch.Tensor]:
    widths = [row_bytes(*column) for column in columns.values()]
    return {
        name: from_bytes(part.clone(memory_format=torch.contiguous_format), columns[name])
        for name, part in zip(columns, rows.split(widths, 1))
    }
