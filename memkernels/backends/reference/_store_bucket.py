"""The buckets of the store's table in Python's integers; csrc/common/store_table.h is the same, byte for byte, and draws the layout.

A bucket is eight int64 words (64 bytes, a cache line): five keys, then five rows of 32 bits and 32 bits of meta: bit i says that place i is
taken, bits 5 + 3i of it hold the high bits of row i, bits 26 and up count the keys that passed this full bucket on their way to the next,
bits 20 to 25 say of which kinds they were.
"""

import torch

PLACES, WORDS, PART = 5, 8, 256  # places of a bucket, its words, and the buckets of a part: what one thread may change alone
KINDS = 6  # of keys, by their hash; a bucket knows which of them passed it
MOST_PASSED = 63  # a count that reaches this stays
MASK = (1 << 64) - 1


def mix(key):
    """A bijection of 64 bits in which every bit of the key moves every bit of the result."""
    key &= MASK
    key = (key ^ (key >> 32)) * 0xE9846AF9B1A615D5 & MASK  # multipliers of odd random bits
    key = (key ^ (key >> 29)) * 0x9FB21C651E98DF25 & MASK
    return key ^ (key >> 32)


def kind_of(key):
    return (mix(key) & 0xFFFF) * KINDS >> 16


def signed(word):
    return word - (1 << 64) if word >> 63 else word


class Bucket:
    """One bucket, taken apart; `words` puts it together."""

    def __init__(self, words):
        rows = [half for word in words[5:] for half in (word & 0xFFFFFFFF, word >> 32 & 0xFFFFFFFF)]
        meta = rows.pop()
        self.keys, self.kinds, self.passed = list(words[:5]), meta >> 20 & 63, meta >> 26
        self.taken = [meta >> i & 1 for i in range(PLACES)]
        self.rows = [rows[i] | (meta >> (5 + 3 * i) & 7) << 32 for i in range(PLACES)]

    def words(self):
        meta = self.passed << 26 | self.kinds << 20
        meta |= sum(self.taken[i] << i | (self.rows[i] >> 32) << (5 + 3 * i) for i in range(PLACES))
        halves = [row & 0xFFFFFFFF for row in self.rows] + [meta]
        return self.keys + [signed(halves[i] | halves[i + 1] << 32) for i in (0, 2, 4)]


class Buckets:
    """Those of a table tensor [buckets, 8], read when they are needed; `save` writes those that changed."""

    def __init__(self, table):
        self.table, self.size = table, table.shape[0]
        self.buckets, self.changed = {}, set()

    def home(self, key):
        return mix(key) * self.size >> 64

    def bucket(self, b):
        if b not in self.buckets:
            self.buckets[b] = Bucket(self.table[b].tolist())
        return self.buckets[b]

    def save(self):
        for b in sorted(self.changed):
            self.table[b] = torch.tensor(self.buckets[b].words(), dtype=torch.int64)

    def part_end(self, b):
        return min((b // PART + 1) * PART, self.size)

    def fill(self, b, place, key, row, taken=1):
        bucket = self.bucket(b)
        bucket.taken[place], bucket.keys[place], bucket.rows[place] = taken, key, row
        self.changed.add(b)

    def count(self, b, kind):
        bucket = self.bucket(b)
        bucket.passed = min(bucket.passed + 1, MOST_PASSED)
        bucket.kinds |= 1 << kind
        self.changed.add(b)

    def uncount(self, begin, end):
        b = begin
        while b != end:
            bucket = self.bucket(b)
            if bucket.passed < MOST_PASSED:
                bucket.passed -= 1
                bucket.kinds *= bucket.passed > 0
                self.changed.add(b)
            b = (b + 1) % self.size
