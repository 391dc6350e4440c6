"""store_upsert_ on CUDA devices (csrc/cuda/store_table.cu)."""

import torch

from memkernels import _C_cuda
from memkernels.backends.cuda._store import left_over, refuse, slices, sorted_by_part

MODES = ("replace", "keep", "assign", "insert")  # mk::store::Mode
PENDING = 1 << 34


def supports(table, keys, rows, mode, spans, arena, data, offsets, second):
    return refuse(table, spans)


def forward(now, old, table, keys, rows, mode, spans, arena, data, offsets, second):
    taken = torch.zeros(1, dtype=torch.int64, device=keys.device)  # rows given to new keys so far
    for part in slices(keys.shape[0]):
        order, starts = sorted_by_part(table, keys[part])
        flags, codes = torch.zeros_like(order, dtype=torch.bool), torch.empty_like(order)
        given = rows if mode == "assign" else rows[part]
        about = (given, MODES.index(mode), now[part], old[part], codes)
        _C_cuda.store_upsert_(table, keys[part], flags, order, starts, None, *about, False)
        later = left_over(flags)
        _C_cuda.store_upsert_(table, keys[part], flags, order, starts, later, *about, False)
        if mode == "assign":
            _assign(now[part], old[part], rows, taken)
            _C_cuda.store_upsert_(table, keys[part], flags, order, starts, None, *about, True)
            _C_cuda.store_upsert_(table, keys[part], flags, order, starts, later, *about, True)


def _assign(now, old, rows, taken):
    """Rows in place of the pending ones: to new keys in the order of the batch, to later ones of the same key the same."""
    new, pending = old == -1, old >= PENDING
    rank = taken + new.cumsum(0) - 1
    now.copy_(torch.where(new, rows[rank.clamp(min=0)], now))
    first = torch.where(pending, old - PENDING, 0)
    now.copy_(torch.where(pending, now[first], now))
    old.copy_(torch.where(pending, now, old))
    taken += new.sum()
