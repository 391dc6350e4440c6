"""store_scatter_ in plain torch: of equal rows the last one stays."""

import torch

from memkernels.backends.reference._store_rows import places


def forward(chunks, firsts, rows, values):
    order = torch.argsort(rows, stable=True)  # equal rows: the last one in the batch is the last here
    last = torch.ones_like(rows, dtype=torch.bool)
    last[:-1] = rows[order][:-1] != rows[order][1:]
    chosen = order[last]
    for chunk, here, at in places(chunks, firsts, rows[chosen], "store_scatter_"):
        chunk[at] = values[chosen[here]]
    return ()
