"""The kernels of the store's table on host memory: the table and every result must be the reference's, bit for bit."""

import random

import torch

from memkernels.backends.reference import store_erase_ as reference_erase
from memkernels.backends.reference import store_find as reference_find
from memkernels.backends.reference import store_move_ as reference_move
from memkernels.backends.reference import store_upsert_ as reference_upsert

NONE = (None,) * 5


def draw(seed, count, among):
    source = random.Random(seed)
    pool = [source.randrange(-(2**63), 2**63) for _ in range(among)]
    return torch.tensor([source.choice(pool) for _ in range(count)], dtype=torch.int64)


def check():
    """(failures, cases) over tables that are nearly full, of one part and of several."""
    from memkernels.backends.cuda import store_erase_, store_find, store_move_, store_upsert_

    failures, count = [], 0
    for buckets in (1, 7, 300, 900):
        for mode in ("replace", "keep", "assign"):
            expected, got = (torch.zeros(buckets, 8, dtype=torch.int64) for _ in range(2))
            for step in range(3):
                keys = draw(step % 2, 2 * buckets, 6 * buckets)
                rows = torch.arange(keys.shape[0]) + 2**34 - 9 * keys.shape[0] * (step + 1)
                now, old, found = (torch.empty_like(keys) for _ in range(3))
                want = [*reference_upsert.forward(expected, keys, rows, mode, *NONE)]
                store_upsert_.forward(now, old, got, keys, rows, mode, *NONE)
                want += [*reference_find.forward(expected, keys, *NONE)]
                store_find.forward(found, got, keys, *NONE)
                want += [*reference_erase.forward(expected, keys[step::2].contiguous(), *NONE), expected]
                gone = torch.empty_like(keys[step::2])
                store_erase_.forward(gone, got, keys[step::2].contiguous(), *NONE)
                count += 1
                for name, a, b in zip(("now", "old", "rows", "removed", "table"), want, (now, old, found, gone, got)):
                    if not torch.equal(a, b):
                        failures.append(f"store_table {buckets} buckets, {mode}, step {step}: {name} differs")
            larger, moved = torch.zeros(2, 2 * buckets, 8, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
            for begin, end in ((0, buckets // 2), (buckets // 2, buckets)):
                want = [*reference_move.forward(expected, larger[0], begin, end), expected, larger[0]]
                store_move_.forward(moved, got, larger[1], begin, end)
                count += 1
                if not all(torch.equal(a, b) for a, b in zip(want, (moved, got, larger[1]))):
                    failures.append(f"store_move_ {buckets} buckets, {mode}, from {begin}: differs")
    return failures, count
