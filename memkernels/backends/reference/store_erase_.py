"""store_erase_ in Python's integers."""

from memkernels.backends.reference._store_table import Keys, Table


def forward(table, keys, spans, arena, data, offsets, second):
    lookup = Table(table, Keys(keys, spans, arena, data, offsets, second))
    removed = [-1] * keys.shape[0]
    holes: dict[int, tuple[int, int]] = {}  # places of elements that are gone, though what passed them by may lie outside the part

    def step(i, leave):
        if i in holes:
            return lookup.close(holes[i], leave)
        found = lookup.find(i, leave)
        if found is None or found[0] < 0:
            return found
        removed[i] = lookup.bucket(found[0]).rows[found[1]]
        lookup.take_out(*found)
        if lookup.close(found, leave):
            return found
        holes[i] = found
        return None

    lookup.in_parts(step)
    lookup.save()
    return (keys.new_tensor(removed),)
