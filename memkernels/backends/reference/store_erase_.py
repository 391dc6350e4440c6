"""store_erase_ in Python's integers."""

from memkernels.backends.reference._store_table import Keys, Table


def forward(table, keys, spans, arena, data, offsets, second):
    lookup = Table(table, Keys(keys, spans, arena, data, offsets, second))
    removed = [-1] * keys.shape[0]
    holes: dict[int, tuple[int, int]] = {}  # the places of elements that are gone

    def take_out(i, leave):
        if i in holes:
            return lookup.close(holes[i], leave)
        found = lookup.find(i, leave)
        if found is None or found[0] < 0:
            return found
        removed[i] = lookup.bucket(found[0]).rows[found[1]]
        lookup.take_out(*found)
        holes[i] = found
        if leave:
            lookup.close(found, leave)
        return found

    lookup.in_parts(take_out, lambda i: i not in holes or lookup.close(holes[i], leave=False))
    lookup.save()
    return (keys.new_tensor(removed),)
