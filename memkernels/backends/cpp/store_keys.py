"""Byte keys of a Python list as tensors, and what else the store asks of the extension (csrc/cpu/store_keys.cpp)."""

import torch

from memkernels import _C
from memkernels._C import prefer_huge_pages

__all__ = ["hashes", "owner_hashes", "pack", "prefer_huge_pages"]


def pack(keys, text, most):
    """(data, offsets, hashes) of a list of bytes or str; None where a key is something else, too long or no UTF-8."""
    count = len(keys)
    pointers, offsets = torch.empty(count, dtype=torch.int64), torch.empty(count + 1, dtype=torch.int64)
    total = _C.store_key_spans(keys, text, most, pointers, offsets)
    if total < 0:
        return None
    data = torch.empty(total, dtype=torch.uint8)
    hashes = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
    _C.store_key_copy(data, *hashes, pointers, offsets)
    return data, offsets, hashes


def hashes(data, offsets):
    """128 bits for each key, in two halves."""
    count = offsets.shape[0] - 1
    first, second = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
    _C.store_key_hashes(first, second, data, offsets)
    return first, second


def owner_hashes(data, offsets):
    """64 bits for each key."""
    out = torch.empty(offsets.shape[0] - 1, dtype=torch.int64)
    _C.store_owner_hashes(out, data, offsets)
    return out
