"""store_gather in plain torch: row `firsts[i] + j` is row j of chunk i; the last chunk is the default, for negative rows."""

import torch

from memkernels.backends.reference._store_rows import places


def forward(chunks, firsts, rows):
    *chunks, default = chunks
    out = default.expand(rows.shape[0], -1).clone(memory_format=torch.contiguous_format)
    for chunk, here, at in places(chunks, firsts, rows, "store_gather"):
        out[here] = chunk[at]
    return (out,)
