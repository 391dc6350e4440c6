"""The table of the key-value store in Python's integers; csrc/common/store_table.h is the same, byte for byte, and draws the layout.

A bucket is eight int64 words (64 bytes, a cache line): five keys, then five rows of 32 bits and 32 bits of meta: bit i says that place i is
taken, bits 5 + 3i of it hold the high bits of row i, bits 20 and up count the keys that passed this full bucket on their way to the next.
"""

import torch

PLACES, WORDS, PART = 5, 8, 256  # places of a bucket, its words, and the buckets of a part: what one thread may change alone
PENDING = 1 << 34  # a row number from here on stands for "the new row of element row - PENDING of this batch"
SLICE = 65536  # elements of a batch that are taken together; the next ones come after them
MOST_PASSED = 4095  # a count that reaches this stays
MASK = (1 << 64) - 1


def mix(key):
    """A bijection of 64 bits in which every bit of the key moves every bit of the result."""
    key &= MASK
    key = (key ^ (key >> 32)) * 0xE9846AF9B1A615D5 & MASK  # multipliers of odd random bits
    key = (key ^ (key >> 29)) * 0x9FB21C651E98DF25 & MASK
    return key ^ (key >> 32)


def signed(word):
    return word - (1 << 64) if word >> 63 else word


class Bucket:
    """One bucket, taken apart; `words` puts it together."""

    def __init__(self, words):
        rows = [half for word in words[5:] for half in (word & 0xFFFFFFFF, word >> 32 & 0xFFFFFFFF)]
        meta = rows.pop()
        self.keys, self.passed = list(words[:5]), meta >> 20
        self.taken = [meta >> i & 1 for i in range(PLACES)]
        self.rows = [rows[i] | (meta >> (5 + 3 * i) & 7) << 32 for i in range(PLACES)]

    def words(self):
        meta = self.passed << 20 | sum(self.taken[i] << i | (self.rows[i] >> 32) << (5 + 3 * i) for i in range(PLACES))
        halves = [row & 0xFFFFFFFF for row in self.rows] + [meta]
        return self.keys + [signed(halves[i] | halves[i + 1] << 32) for i in (0, 2, 4)]


class Keys:
    """The keys of a batch: 64 bits each, and for byte keys 64 more and their bytes, which are compared where the first 64 agree."""

    def __init__(self, keys, spans, arena, data, offsets, second):
        self.hashes, self.spans, self.arena = keys.tolist(), spans, arena
        if spans is not None:
            ends, data = offsets.tolist(), bytes(data.tolist())
            self.texts = [(half, data[begin:end]) for half, begin, end in zip(second.tolist(), ends, ends[1:])]

    def same(self, i, key, row):
        """Whether element i of the batch is the key that lies in a place with this row."""
        if key != self.hashes[i]:
            return False
        if self.spans is None:
            return True
        if row >= PENDING:
            return self.texts[i] == self.texts[row - PENDING]
        span, half = self.spans[row].tolist()
        return self.texts[i] == (half, bytes(self.arena[span >> 24 :][: span & 0xFFFFFF].tolist()))


class Table:
    """Buckets of a table tensor [buckets, 8], read when they are needed; `save` writes those that changed."""

    def __init__(self, table, keys):
        self.table, self.keys, self.size = table, keys, table.shape[0]
        self.buckets, self.changed = {}, set()

    def home(self, i):
        return mix(self.keys.hashes[i]) * self.size >> 64

    def bucket(self, b):
        if b not in self.buckets:
            self.buckets[b] = Bucket(self.table[b].tolist())
        return self.buckets[b]

    def save(self):
        for b in sorted(self.changed):
            self.table[b] = torch.tensor(self.buckets[b].words(), dtype=torch.int64)

    def path(self, i, leave):
        """The buckets in which key i may lie, from its home on; None in place of the first one outside the home's part unless `leave`."""
        b = home = self.home(i)
        end = min((home // PART + 1) * PART, self.size)
        for _ in range(self.size):
            if b >= end and not leave:
                yield None
                return
            yield b % self.size
            if not self.bucket(b % self.size).passed:
                return
            b += 1

    def find(self, i, leave=True):
        """(bucket, place) of key i; (-1, 0) where it is absent, None where only a look outside the part can tell."""
        for b in self.path(i, leave):
            if b is None:
                return None
            bucket = self.bucket(b)
            for place in range(PLACES):
                if bucket.taken[place] and self.keys.same(i, bucket.keys[place], bucket.rows[place]):
                    return b, place
        return -1, 0

    def put(self, i, row, leave):
        """Key i, which is absent, goes to the first free place from its home on. (bucket, place); None: not in this part; (-1, 0): full."""
        b = home = self.home(i)
        end = min((home // PART + 1) * PART, self.size)
        for step in range(self.size):
            if b >= end and not leave:
                return None
            bucket = self.bucket(b % self.size)
            if not all(bucket.taken):
                place = bucket.taken.index(0)
                bucket.taken[place], bucket.keys[place], bucket.rows[place] = 1, self.keys.hashes[i], row
                self.changed.add(b % self.size)
                for back in range(step):
                    self._count((home + back) % self.size, 1)
                return b % self.size, place
            b += 1
        return -1, 0

    def take_out(self, i, b, place):
        """Empty a place; the buckets that its key had passed count one less."""
        bucket, at = self.bucket(b), self.home(i)
        bucket.taken[place], bucket.keys[place], bucket.rows[place] = 0, 0, 0
        self.changed.add(b)
        while at != b:
            self._count(at, -1)
            at = (at + 1) % self.size

    def _count(self, b, by):
        bucket = self.bucket(b)
        if bucket.passed < MOST_PASSED:
            bucket.passed += by
            self.changed.add(b)

    def in_parts(self, step):
        """step(i, leave=False) for every element of a slice; those it answers with None once more afterwards, in order, with leave=True.

        Keys that stay inside the part of their home come first, so that threads which own parts give the same table as one does.
        """
        count = len(self.keys.hashes)
        for begin in range(0, count, SLICE):
            later = [i for i in range(begin, min(begin + SLICE, count)) if step(i, False) is None]
            for i in later:
                step(i, True)
