"""Weighted sums of rows in plain torch: gather the rows of each bag, weigh, add up.

Flat arguments: table "K D", index int64 "B J" (-1: absent), weight "B J".
"""

from memkernels.backends.reference._math import compute


def forward(table, index, weight):
    rows, absent = _rows(table, index)
    return ((_present(weight, absent)[..., None] * rows).sum(1).to(table.dtype),)


def backward(dout, table, index, weight):
    rows, absent = _rows(table, index)
    dout = compute(dout)[:, None, :].expand(rows.shape).masked_fill(absent[..., None], 0)
    given = (_present(weight, absent)[..., None] * dout).flatten(0, 1)
    at = index.clamp(min=0).flatten() if table.shape[0] else index.new_zeros(0)
    dtable = given.new_zeros(table.shape).index_add(0, at, given[: at.shape[0]])
    return dtable.to(table.dtype), (rows * dout).sum(-1).to(weight.dtype)


def _rows(table, index):
    """Rows "B J D", 0 where absent, and where that is; what stands in rows that nobody names reaches nothing."""
    absent = index < 0
    if table.shape[0] == 0:
        return compute(table).new_zeros(*index.shape, table.shape[1]), absent
    return compute(table[index.clamp(min=0)]).masked_fill(absent[..., None], 0), absent


def _present(weight, absent):
    return compute(weight).masked_fill(absent, 0)
