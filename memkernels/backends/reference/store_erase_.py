"""store_erase_ in Python's integers."""

from memkernels.backends.reference._store_table import Keys, Table


def forward(table, keys, spans, arena, data, offsets, second):
    lookup = Table(table, Keys(keys, spans, arena, data, offsets, second))
    removed = [-1] * keys.shape[0]

    def step(i, leave):
        found = lookup.find(i, leave)
        if found is not None and found[0] >= 0:
            removed[i] = lookup.bucket(found[0]).rows[found[1]]
            lookup.take_out(i, *found)
        return found

    lookup.in_parts(step)
    lookup.save()
    return (keys.new_tensor(removed),)
