"""store_move_ on CUDA devices: the keys of the buckets, then the kernels of store_upsert_, which sort them by part."""

import torch

from memkernels.backends.cuda import store_upsert_
from memkernels.backends.cuda._store import refuse
from memkernels.backends.reference import store_items
from memkernels.backends.reference.store_move_ import empty


def supports(old, table, begin, end):
    return refuse(table, None)


def forward(moved, old, table, begin, end):
    keys, rows, count = store_items.forward(old, begin, end)
    moved.copy_(count)
    keys, rows = keys[: int(count)], rows[: int(count)]
    now, before = torch.empty_like(keys), torch.empty_like(keys)
    store_upsert_.forward(now, before, table, keys, rows, "insert", None, None, None, None)
    empty(old, begin, end)
