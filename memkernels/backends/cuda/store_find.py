"""store_find on CUDA devices (csrc/cuda/store_table.cu)."""

from memkernels import _C_cuda
from memkernels.backends.cuda._store import refuse


def supports(table, keys, spans, arena, data, offsets, second):
    return refuse(table, spans)


def forward(rows, table, keys, spans, arena, data, offsets, second):
    if keys.shape[0]:
        _C_cuda.store_find(rows, table, keys)
