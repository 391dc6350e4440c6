"""store_erase_ on CUDA devices (csrc/cuda/store_table.cu)."""

import torch

from memkernels import _C_cuda
from memkernels.backends.cuda._store import left_over, refuse, slices, sorted_by_part


def supports(table, keys, spans, arena, data, offsets, second):
    return refuse(table, spans)


def forward(removed, table, keys, spans, arena, data, offsets, second):
    for part in slices(keys.shape[0]):
        order, starts = sorted_by_part(table, keys[part])
        flags, codes = torch.zeros_like(order, dtype=torch.bool), torch.empty_like(order)
        _C_cuda.store_erase_(table, keys[part], flags, order, starts, None, removed[part], codes)
        _C_cuda.store_erase_(table, keys[part], flags, order, starts, left_over(flags), removed[part], codes)
