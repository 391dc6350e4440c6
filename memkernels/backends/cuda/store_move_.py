"""store_move_ on CUDA devices: the keys of the buckets, then the kernels of store_upsert_, which sort them by part."""

import torch

from memkernels.backends.cuda import store_upsert_
from memkernels.backends.cuda._store import refuse

PASSED = -(1 << 52)  # the bits of a bucket's last word that count the keys which passed it


def supports(old, table, begin, end):
    return refuse(table, None)


def forward(moved, old, table, begin, end):
    keys, rows = held(old[begin:end])
    moved.fill_(keys.shape[0])
    now, before = torch.empty_like(keys), torch.empty_like(keys)
    store_upsert_.forward(now, before, table, keys, rows, "insert", None, None, None, None, None)
    if end == old.shape[0]:  # else keys of these buckets that lie further on must still be found
        old.zero_()
    else:
        old[begin:end, :7] = 0
        old[begin:end, 7] &= PASSED


def held(buckets):
    """Keys and rows: five of each in a bucket, of which the bits 32 to 36 of its last word say which are taken."""
    places = torch.arange(5, device=buckets.device)
    last = buckets[:, 7:]
    low = buckets[:, 5:].contiguous().view(torch.int32)[:, :5].long() & 0xFFFFFFFF
    high = last >> (37 + 3 * places) & 7
    taken = (last >> (32 + places) & 1).bool()
    return buckets[:, :5][taken], (low | high << 32)[taken]
