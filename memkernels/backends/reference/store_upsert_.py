"""store_upsert_ in Python's integers: the elements of the batch, those first whose keys stay in the part of their home."""

from memkernels.backends.reference._store_table import PENDING, Keys, Table


def forward(table, keys, rows, mode, spans, arena, data, offsets, second):
    lookup, count = Table(table, Keys(keys, spans, arena, data, offsets, second)), keys.shape[0]
    given, now, old, places = rows.tolist(), [-1] * count, [-1] * count, {}

    def step(i, leave):
        found = (-1, 0) if mode == "insert" else lookup.find(i, leave)
        if found is None:
            return None
        row = PENDING + i if mode == "assign" else given[i]
        if found[0] < 0:
            found = lookup.put(i, row, leave)
            if found is None:
                return None
            if found[0] < 0:
                old[i] = -2
                return True
            places[i], now[i] = found, row
            return True
        bucket, place = lookup.bucket(found[0]), found[1]
        old[i] = bucket.rows[place]
        if mode == "replace":
            bucket.rows[place] = row
            lookup.changed.add(found[0])
        now[i] = bucket.rows[place]
        return True

    lookup.in_parts(step)
    if mode == "assign":
        fresh = {PENDING + i: given[rank] for rank, i in enumerate(sorted(places))}
        for i, (b, place) in places.items():
            lookup.bucket(b).rows[place] = fresh[PENDING + i]
        now, old = ([fresh.get(row, row) for row in side] for side in (now, old))
    lookup.save()
    return keys.new_tensor(now), keys.new_tensor(old)
