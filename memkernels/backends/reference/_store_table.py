"""The table of the key-value store in Python's integers: where keys lie, and how they come and go."""

from memkernels.backends.reference._store_bucket import PLACES, Buckets, kind_of

PENDING = 1 << 34  # a row number from here on stands for "the new row of element row - PENDING of this batch"
SLICE = 65536  # elements of a batch that are taken together; the next ones come after them


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


class Table(Buckets):
    """A table tensor [buckets, 8] and the keys of a batch."""

    def __init__(self, table, keys):
        super().__init__(table)
        self.keys = keys

    def path(self, i, leave):
        """The buckets in which key i may lie, from its home on; None in place of the first one outside the home's part unless `leave`."""
        key = self.keys.hashes[i]
        b = home = self.home(key)
        end = self.part_end(home)
        for _ in range(self.size):
            if b >= end and not leave:
                yield None
                return
            yield b % self.size
            if not self.bucket(b % self.size).kinds >> kind_of(key) & 1:
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
        key = self.keys.hashes[i]
        b = home = self.home(key)
        end = self.part_end(home)
        for _ in range(self.size):
            if b >= end and not leave:
                return None
            if not all(self.bucket(b % self.size).taken):
                place = self.bucket(b % self.size).taken.index(0)
                self.fill(b % self.size, place, key, row)
                for passed in range(home, b):
                    self.count(passed % self.size, kind_of(key))
                return b % self.size, place
            b += 1
        return -1, 0

    def take_out(self, b, place):
        """Free a place; the buckets that its key had passed count one less. What passed its bucket by comes back with `close`."""
        self.uncount(self.home(self.bucket(b).keys[place]), b)
        self.fill(b, place, 0, 0, taken=0)

    def close(self, hole, leave):
        """Move the keys that passed a free place by. False, with nothing done: where they end is known only outside the part."""
        b, place = hole
        if not leave and self._passed_out(b):
            return False
        while found := self._passed_by(b):
            bucket = self.bucket(found[0])
            self.fill(b, place, bucket.keys[found[1]], bucket.rows[found[1]])
            self.uncount(b, found[0])
            b, place = found
            self.fill(b, place, 0, 0, taken=0)
        return True

    def _passed_out(self, b):
        """Whether one of the keys that passed a bucket, or one that those passed in turn, may lie outside its part."""
        end = self.part_end(b)
        while self.bucket(b).passed:
            b += 1
            if b >= end:
                return True
        return False

    def _passed_by(self, begin):
        """(bucket, place) of the first key behind a bucket whose home is not behind it; None."""
        b = begin
        for step in range(1, self.size):
            if not self.bucket(b).passed:
                return None
            b = (b + 1) % self.size
            for place, key in enumerate(self.bucket(b).keys):
                if self.bucket(b).taken[place] and (b - self.home(key)) % self.size >= step:
                    return b, place
        return None

    def in_parts(self, step, after=lambda i: True):
        """step(i, leave=False) for the elements of a slice, then after(i) for each; step(i, leave=True) where one of these fails, in order.

        Keys that stay inside the part of their home come first, so that threads which own parts give the same table as one does.
        """
        count = len(self.keys.hashes)
        for begin in range(0, count, SLICE):
            elements = range(begin, min(begin + SLICE, count))
            later = {i for i in elements if step(i, False) is None}
            later |= {i for i in elements if not after(i)}
            for i in sorted(later):
                step(i, True)
