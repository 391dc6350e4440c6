"""What the writing ops of the store's table share on CUDA devices (csrc/cuda/store_table.cu)."""

import torch

from memkernels import _C_cuda
from memkernels.backends.cuda import refuse_device

SLICE, PART = 65536, 256  # as in csrc/common/store_table.h


def refuse(table, spans):
    return refuse_device(table.device) or ("byte keys are compared on the CPU" if spans is not None else None)


def slices(count):
    """Elements of a batch that are taken together, one slice after another."""
    return [slice(begin, min(begin + SLICE, count)) for begin in range(0, count, SLICE)]


def sorted_by_part(table, keys):
    """(order, starts): the elements sorted by the part of their home, stable, and where each part begins. Nothing waits for the device."""
    parts = torch.empty_like(keys)
    _C_cuda.store_parts(parts, table, keys)
    parts, order = torch.sort(parts, stable=True)
    ends = torch.arange((table.shape[0] + PART - 1) // PART + 1, device=keys.device)
    return order, torch.searchsorted(parts, ends)


def left_over(flags):
    """The marked elements first, in order, then the others."""
    return torch.argsort(flags.byte(), descending=True, stable=True)
