// The hash table of the key-value store: one layout and one hash for the CPU, for CUDA and for the reference in Python
// (memkernels/backends/reference/_store_bucket.py), so that a table moves between them byte for byte.
//
// A bucket is one cache line of eight 64-bit words, little-endian:
//   words 0-4        five keys (int64, or the first 64 bits of the hash of a byte key)
//   then 5 x 32 bits the low bits of their rows
//   then 32 bits     meta: bit i: place i is taken; bits 5 + 3i: three more bits of row i; bits 20-25: kinds of keys
//                    that passed; bits 26-31: passed
// A free place is all zeros, so every 64-bit value may be a key and an erased key leaves nothing behind. `passed`
// counts the keys that went on from this bucket to the next because it was full, and the bit of its kind (one of six,
// by its hash) says that one like it may be among them: a search goes on only past a bucket that has it. At load 0.75
// an absent key is looked for in 1.25 buckets; by the count alone, in 1.8. Keys and rows in one line: a search costs
// one cache miss, where 8-bit digests in a line of their own would cost two.
//
// An erased key takes its counts back; the kinds go when none is left. Its place takes in the first key that passed the
// bucket by, whose place takes in the next one, and so on: there are no tombstones, and keys lie as near to their homes
// as if what is gone had never been there. Without that a table at load 0.75 whose keys are all replaced a few times
// needs 11 looks for an absent key, at 0.85 hundreds. All keys of a part are taken out before the first place is
// filled, so where neighbours go together nothing is moved.
//
// The home of a key is the high half of hash x buckets: the order of the buckets is the order of the hashes in a table
// of any size, so a table that grows is copied front to back. A part is 256 buckets: a thread that owns parts may do
// whatever stays inside them; what leaves its part is done at the end of the slice, in the order of the batch. Hence
// the table does not depend on who did what.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define MK_BOTH __host__ __device__ __forceinline__
#else
#define MK_BOTH inline __attribute__((always_inline))
#endif

namespace mk::store {

constexpr int kPlaces = 5, kWords = 8;
constexpr int64_t kPart = 256;
constexpr int64_t kSlice = 65536;  // elements of a batch that are taken together; the next ones come after them
constexpr int64_t kPending = int64_t(1) << 34;  // row kPending + i: "the new row of element i of this batch"
constexpr uint32_t kKindBits = 20, kKinds = 6, kPassedBits = 26;  // of meta
constexpr uint32_t kKindMask = ((1u << kKinds) - 1) << kKindBits;
constexpr uint32_t kMostPassed = 63;  // a count that reaches this stays

MK_BOTH uint64_t high_product(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  return uint64_t((unsigned __int128)a * b >> 64);
#endif
}

constexpr uint64_t kMixFirst = 0xE9846AF9B1A615D5ull, kMixSecond = 0x9FB21C651E98DF25ull;
MK_BOTH uint64_t mix(uint64_t key) {
  key = (key ^ (key >> 32)) * kMixFirst;
  key = (key ^ (key >> 29)) * kMixSecond;
  return key ^ (key >> 32);
}

MK_BOTH int64_t home_of(uint64_t key, int64_t buckets) { return int64_t(high_product(mix(key), uint64_t(buckets))); }

MK_BOTH uint32_t meta_of(const uint64_t* bucket) { return uint32_t(bucket[7] >> 32); }
MK_BOTH void set_meta(uint64_t* bucket, uint32_t meta) {
  bucket[7] = (bucket[7] & 0xFFFFFFFFull) | uint64_t(meta) << 32;
}
MK_BOTH uint32_t passed_of(const uint64_t* bucket) { return meta_of(bucket) >> kPassedBits; }
// The bit of meta that a key of this hash sets in buckets that it passes.
MK_BOTH uint32_t kind_of(uint64_t hash) { return kKindBits + uint32_t((hash & 0xFFFF) * kKinds >> 16); }

MK_BOTH int64_t row_at(const uint64_t* bucket, int place) {
  const uint64_t low = bucket[5 + place / 2] >> (place % 2 * 32) & 0xFFFFFFFFull;
  return int64_t(low | uint64_t(meta_of(bucket) >> (5 + 3 * place) & 7) << 32);
}
MK_BOTH void set_row(uint64_t* bucket, int place, int64_t row) {
  const int shift = place % 2 * 32, high = 5 + 3 * place;
  uint64_t& word = bucket[5 + place / 2];
  word = (word & ~(0xFFFFFFFFull << shift)) | (uint64_t(row) & 0xFFFFFFFFull) << shift;
  set_meta(bucket, (meta_of(bucket) & ~(7u << high)) | uint32_t(uint64_t(row) >> 32) << high);
}

// Bit i: place i is taken by this key.
MK_BOTH uint32_t matches(const uint64_t* bucket, uint64_t key) {
  uint32_t same = 0;
  for (int i = 0; i < kPlaces; i++) same |= uint32_t(bucket[i] == key) << i;
  return same & meta_of(bucket);
}

MK_BOTH int lowest(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __ffs(int(bits)) - 1;
#else
  return __builtin_ctz(bits);
#endif
}

struct Place {
  int64_t bucket;
  int place;
};
constexpr int64_t kAbsent = -1, kOutside = -2;  // in Place::bucket: not there or no room; only known outside the part

struct Table {
  uint64_t* words;
  int64_t buckets;
  MK_BOTH uint64_t* at(int64_t bucket) const { return words + bucket * kWords; }
  MK_BOTH int64_t wrapped(int64_t bucket) const { return bucket < buckets ? bucket : bucket - buckets; }
  MK_BOTH int64_t part_end(int64_t home) const {
    const int64_t end = (home / kPart + 1) * kPart;
    return end < buckets ? end : buckets;
  }

  // Where a key lies. same(row) tells keys apart whose 64 bits agree.
  template <class Same>
  MK_BOTH Place find(uint64_t key, int64_t home, bool leave, const Same& same) const {
    const int64_t end = part_end(home);
    const uint32_t kind = kind_of(mix(key));
    for (int64_t step = 0; step < buckets; step++) {
      if (home + step >= end && !leave) return {kOutside, 0};
      const int64_t b = wrapped(home + step);
      const uint64_t* bucket = at(b);
      for (uint32_t found = matches(bucket, key); found; found &= found - 1) {
        const int place = lowest(found);
        if (same(row_at(bucket, place))) return {b, place};
      }
      if (!(meta_of(bucket) >> kind & 1)) break;
    }
    return {kAbsent, 0};
  }

  // An absent key goes to the first free place from its home on.
  MK_BOTH Place put(uint64_t key, int64_t row, int64_t home, bool leave) const {
    const int64_t end = part_end(home);
    for (int64_t step = 0; step < buckets; step++) {
      if (home + step >= end && !leave) return {kOutside, 0};
      const int64_t b = wrapped(home + step);
      uint64_t* bucket = at(b);
      const uint32_t free = ~meta_of(bucket) & ((1u << kPlaces) - 1);
      if (!free) continue;
      const int place = lowest(free);
      fill_in({b, place}, key, row);  // the rest of a free place is zeros
      for (int64_t back = 0; back < step; back++) count(wrapped(home + back), kind_of(mix(key)));
      return {b, place};
    }
    return {kAbsent, 0};
  }

  // Frees a place; its key counts no longer. What passed its bucket by comes back with close().
  MK_BOTH void take_out(Place where, int64_t home) const {
    uncount(home, where.bucket);
    clear(where);
  }

  // Moves the keys that passed a free place by. False, with nothing done: where they end is known only outside the
  // part.
  MK_BOTH bool close(Place hole, bool leave) const {
    if (!leave && passed_out(hole.bucket)) return false;
    for (Place next = passed_by(hole.bucket); next.bucket != kAbsent; next = passed_by(hole.bucket)) {
      const uint64_t* from = at(next.bucket);
      fill_in(hole, from[next.place], row_at(from, next.place));
      uncount(hole.bucket, next.bucket);
      clear(next);
      hole = next;
    }
    return true;
  }

  // Whether one of the keys that passed a bucket, or one that those passed in turn, may lie outside its part.
  MK_BOTH bool passed_out(int64_t b) const {
    const int64_t end = part_end(b);
    while (passed_of(at(b)))
      if (++b >= end) return true;
    return false;
  }

  // The first key behind a bucket whose home is not behind it.
  MK_BOTH Place passed_by(int64_t bucket) const {
    int64_t b = bucket;
    for (int64_t step = 1; step < buckets && passed_of(at(b)); step++) {
      b = wrapped(b + 1);
      uint32_t found = 0;  // all places, and one branch: which of them it is cannot be predicted
      for (int i = 0; i < kPlaces; i++) {
        const int64_t far = b - home_of(at(b)[i], buckets);
        found |= uint32_t((far < 0 ? far + buckets : far) >= step) << i;
      }
      found &= meta_of(at(b));
      if (found) return {b, lowest(found)};
    }
    return {kAbsent, 0};
  }

  MK_BOTH void fill_in(Place where, uint64_t key, int64_t row) const {
    uint64_t* bucket = at(where.bucket);
    const int place = where.place;
    bucket[place] = key;
    bucket[5 + place / 2] |= (uint64_t(row) & 0xFFFFFFFFull) << place % 2 * 32;
    bucket[7] |= uint64_t(1u << place | uint32_t(uint64_t(row) >> 32) << (5 + 3 * place)) << 32;
  }

  MK_BOTH void clear(Place where) const {
    uint64_t* bucket = at(where.bucket);
    set_row(bucket, where.place, 0);
    set_meta(bucket, meta_of(bucket) & ~(1u << where.place));
    bucket[where.place] = 0;
  }

  MK_BOTH void count(int64_t b, uint32_t kind) const {
    uint64_t* bucket = at(b);
    const uint32_t more = passed_of(bucket) < kMostPassed ? 1u << kPassedBits : 0;
    set_meta(bucket, (meta_of(bucket) | 1u << kind) + more);
  }

  MK_BOTH void uncount(int64_t from, int64_t to) const {
    for (int64_t b = from; b != to; b = wrapped(b + 1)) {
      uint64_t* bucket = at(b);
      if (passed_of(bucket) == kMostPassed) continue;
      const uint32_t less = meta_of(bucket) - (1u << kPassedBits);
      set_meta(bucket, less >> kPassedBits ? less : less & ~kKindMask);
    }
  }
};

struct Any {
  MK_BOTH bool operator()(int64_t) const { return true; }
};

// What upserting does with a key that is there, and with one that is not.
enum class Mode : int { replace, keep, assign, insert };

struct Upserted {
  int64_t now, old;  // old: -1 new, -2 no room
  Place place;       // of a new key; kOutside: to be done again with leave = true
};
template <class Same>
MK_BOTH Upserted upsert(const Table& table, uint64_t key, int64_t row, Mode mode, bool leave, const Same& same) {
  const int64_t home = home_of(key, table.buckets);
  Place found = mode == Mode::insert ? Place{kAbsent, 0} : table.find(key, home, leave, same);
  if (found.bucket == kOutside) return {-1, -1, found};
  if (found.bucket == kAbsent) {
    found = table.put(key, row, home, leave);
    if (found.bucket == kAbsent) return {-1, -2, found};
    return {row, -1, found};
  }
  uint64_t* bucket = table.at(found.bucket);
  const int64_t old = row_at(bucket, found.place);
  if (mode == Mode::replace) set_row(bucket, found.place, row);
  return {mode == Mode::replace ? row : old, old, {kAbsent, 0}};
}

}  // namespace mk::store
