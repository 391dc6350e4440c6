"""store_items in plain torch: what lies in buckets, then anything up to the size of the outputs, and how much of it counts."""

import torch


def forward(table, begin, end):
    words = table[begin:end]
    meta, place = words[:, 7:] >> 32, torch.arange(5, device=table.device)
    halves = words[:, 5:].contiguous().view(torch.int32).long() & 0xFFFFFFFF
    taken = (meta >> place & 1).bool()
    rows = (halves[:, :5] | (meta >> (5 + 3 * place) & 7) << 32)[taken]
    spare = rows.new_zeros(5 * (end - begin) - rows.shape[0])
    return torch.cat([words[:, :5][taken], spare]), torch.cat([rows, spare]), rows.new_tensor([rows.shape[0]])
