"""store_move_ in plain torch: what lies in the buckets is inserted into the other table, then they are emptied."""

from memkernels.backends.reference import store_items, store_upsert_

PASSED = -(1 << 52)  # the bits of a bucket's last word that count the keys which passed it


def forward(old, table, begin, end):
    keys, rows, count = store_items.forward(old, begin, end)
    moved = int(count)
    store_upsert_.forward(table, keys[:moved], rows[:moved], "insert", None, None, None, None, None)
    empty(old, begin, end)
    return (count,)


def empty(old, begin, end):
    """Nothing is left of the keys; keys of these buckets that lie further on are still found, until the table is done with."""
    if end == old.shape[0]:
        old.zero_()
        return
    old[begin:end, :7] = 0
    old[begin:end, 7] &= PASSED
