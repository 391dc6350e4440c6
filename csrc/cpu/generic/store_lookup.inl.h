// store_lookup: a key or a row is some cache lines at a random place, so those of the elements further on are on their
// way while one is looked at. A key that its bucket passed on waits in a list, whose next buckets are fetched a group
// at a time and looked at when the list is full.
//
// Looking costs as much as waiting: 65,536 keys in a table of 64 kB took 0.35 ms on two threads while the hash was
// computed key by key and a found key was a branch, 0.15 ms now.
#include <algorithm>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/store_lookup.h"

namespace mk::cpu::MK_LEVEL {
namespace {

using namespace mk::store;

constexpr int64_t kGroup = 32;  // keys whose buckets are fetched together
constexpr int64_t kAhead = 32;  // rows under way
constexpr int64_t kBucketBytes = kWords * int64_t(sizeof(uint64_t));
constexpr uint32_t kPlaceMask = (1u << kPlaces) - 1, kHighRows = ((1u << 3 * kPlaces) - 1) << kPlaces;  // of meta

// Bit i: place i is taken by this key.
inline uint32_t places_of(const uint64_t* bucket, [[maybe_unused]] uint32_t meta, uint64_t key) {
#if defined(__AVX512F__)
  const __m512i same = _mm512_set1_epi64(int64_t(key));
  return uint32_t(_mm512_mask_cmpeq_epi64_mask(kPlaceMask, _mm512_loadu_si512(bucket), same)) & meta;
#elif defined(__AVX2__)
  const __m256i four = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bucket));
  const __m256i same = _mm256_cmpeq_epi64(four, _mm256_set1_epi64x(int64_t(key)));
  return (uint32_t(_mm256_movemask_pd(_mm256_castsi256_pd(same))) | uint32_t(bucket[4] == key) << 4) & meta;
#else
  return matches(bucket, key);
#endif
}

// The row of the place in `found`, -1 of none. No branch on whether there is one, which cannot be predicted; one for
// rows of more than 32 bits, which a table has or has not.
inline int64_t row_of(const uint64_t* bucket, uint32_t meta, uint32_t found) {
  if (__builtin_expect((meta & kHighRows) != 0, 0)) return found ? row_at(bucket, lowest(found)) : -1;
  const int place = lowest(found | 1u << kPlaces);  // of none, meta
  uint32_t row;
  std::memcpy(&row, reinterpret_cast<const char*>(bucket + kPlaces) + place * sizeof(row), sizeof(row));
  return int64_t(row) | -int64_t(!found);
}

// Where a key is looked for: its bucket in bytes from the first one, and in the six bits that this leaves free the bit
// of meta that sends keys of its kind on to the next one.
inline int64_t start_of(uint64_t key, int64_t buckets) {
  return home_of(key, buckets) * kBucketBytes | int64_t(kind_of(mix(key)));
}

void starts_of(const uint64_t* keys, int64_t count, int64_t buckets, int64_t* starts) {
  int64_t i = 0;
#if defined(__AVX512DQ__)
  const __m512i size = _mm512_set1_epi64(buckets), half = _mm512_set1_epi64(0xFFFF);
  const auto mixed = [](__m512i key, int shift, uint64_t factor) {
    return _mm512_mullo_epi64(_mm512_xor_si512(key, _mm512_srli_epi64(key, shift)), _mm512_set1_epi64(int64_t(factor)));
  };
  for (; i + 8 <= count && buckets <= 0xFFFFFFFF; i += 8) {
    __m512i hash = mixed(mixed(_mm512_loadu_si512(keys + i), 32, kMixFirst), 29, kMixSecond);
    hash = _mm512_xor_si512(hash, _mm512_srli_epi64(hash, 32));
    const __m512i low = _mm512_srli_epi64(_mm512_mul_epu32(hash, size), 32);
    const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(hash, 32), size);
    const __m512i home = _mm512_srli_epi64(_mm512_add_epi64(low, high), 32);
    const __m512i kind = _mm512_mul_epu32(_mm512_and_si512(hash, half), _mm512_set1_epi64(kKinds));
    const __m512i bit = _mm512_add_epi64(_mm512_srli_epi64(kind, 16), _mm512_set1_epi64(kKindBits));
    _mm512_storeu_si512(starts + i, _mm512_or_si512(_mm512_slli_epi64(home, 6), bit));
  }
#endif
  for (; i < count; i++) starts[i] = start_of(keys[i], buckets);
}

class Finder {
 public:
  Finder(const Table& table, const uint64_t* keys, int64_t* rows) : table_(table), keys_(keys), rows_(rows) {}

  void run(int64_t begin, int64_t end) {
    int64_t starts[2][kGroup];
    fetch(begin, end, starts[0]);
    for (int turn = 0; begin < end; turn ^= 1, begin += kGroup) {
      fetch(begin + kGroup, end, starts[turn ^ 1]);
      int64_t listed = count_;  // not the member: for all the compiler knows, a row may be stored over that
      for (int64_t k = 0; k < std::min(kGroup, end - begin); k++) listed += look(begin + k, starts[turn][k], listed);
      count_ = listed;
      fetch_next();
      while (count_ > kMost - kGroup) next_buckets();
    }
    while (count_) next_buckets();
  }

 private:
  static constexpr int64_t kMost = 128;

  uint64_t* at(int64_t where) const {
    return reinterpret_cast<uint64_t*>(reinterpret_cast<char*>(table_.words) + (where & -kBucketBytes));
  }

  void fetch(int64_t begin, int64_t end, int64_t* starts) const {
    if (begin >= end) return;
    const int64_t count = std::min(kGroup, end - begin);
    starts_of(keys_ + begin, count, table_.buckets, starts);
    for (int64_t k = 0; k < count; k++) __builtin_prefetch(at(starts[k]), 0, 2);
  }

  // Looks for key i in a bucket, and writes it to a place of the list; whether it stays there, as keys like it passed.
  bool look(int64_t i, int64_t where, int64_t place) {
    const uint64_t* bucket = at(where);
    const uint32_t meta = meta_of(bucket), found = places_of(bucket, meta, keys_[i]);
    rows_[i] = row_of(bucket, meta, found);
    list_[place] = i, next_[place] = where;
    return (found == 0) & (meta >> (where & 31) & 1);
  }

  void fetch_next() {
    for (; fetched_ < count_; fetched_++) {
      int64_t& next = next_[fetched_];
      next += kBucketBytes;
      if (next >= table_.buckets * kBucketBytes) next -= table_.buckets * kBucketBytes, around_ = true;
      __builtin_prefetch(at(next), 0, 2);
    }
  }

  void next_buckets() {
    const int64_t before = count_;
    int64_t listed = 0;
    for (int64_t k = 0; k < before; k++) {
      const int64_t i = list_[k];
      if (around_ && next_[k] == start_of(keys_[i], table_.buckets)) continue;  // it has seen all of the table
      listed += look(i, next_[k], listed);
    }
    count_ = listed, fetched_ = 0;
    fetch_next();
  }

  const Table table_;
  const uint64_t* const keys_;
  int64_t* const rows_;
  int64_t list_[kMost + 1], next_[kMost + 1];  // a key's place in the batch, and where it is looked for next
  int64_t count_ = 0, fetched_ = 0;            // keys in the list, and how many of their next buckets are on their way
  bool around_ = false;                        // after the last bucket a key was looked for in the first
};

void find(const Table& table, const uint64_t* keys, int64_t* rows, int64_t begin, int64_t end) {
  Finder(table, keys, rows).run(begin, end);
}

// Whole lines at once: stores that go past the caches in pieces of a line, between loads, took half as long again.
inline void stream_row(char* to, const char* from, int64_t width) {
#if defined(__AVX512F__)
  for (int64_t at = 0; at < width; at += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), _mm512_loadu_si512(from + at));
#elif defined(__AVX__)
  for (int64_t at = 0; at < width; at += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at)));
#elif defined(__SSE2__)
  for (int64_t at = 0; at < width; at += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + at), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at)));
#else
  std::memcpy(to, from, size_t(width));
#endif
}

int64_t gather(const StoreGather& work, int64_t begin, int64_t end) {
  const char* from[kAhead];
  int64_t wrong = -1;
  const int64_t fetched = std::min<int64_t>(work.width, 512);
  for (int64_t i = begin; i < end + kAhead; i++) {
    if (i - kAhead >= begin) {
      char* to = work.to + (i - kAhead) * work.width;
      if (work.past_caches)
        stream_row(to, from[i % kAhead], work.width);
      else
        std::memcpy(to, from[i % kAhead], size_t(work.width));
    }
    if (i >= end) continue;
    const char* row = work.rows[i] < 0 ? work.absent : work.chunks.at(work.rows[i]);
    if (!row) wrong = work.rows[i], row = work.absent;
    from[i % kAhead] = row;
    for (int64_t at = 0; at < fetched; at += 64) __builtin_prefetch(row + at, 0, 2);
  }
#if defined(__SSE2__)
  if (work.past_caches) _mm_sfence();
#endif
  return wrong;
}

void scatter(const StoreScatter& work, int64_t owner, int64_t begin, int64_t end) {
  char* to[kAhead] = {};
  const int64_t fetched = work.past_caches ? 0 : std::min<int64_t>(work.width, 512);
  for (int64_t i = begin; i < end + kAhead; i++) {
    char*& row = to[i % kAhead];
    if (row) {
      const char* from = work.from + (i - kAhead) * work.step;
      if (work.past_caches)
        stream_row(row, from, work.width);
      else
        std::memcpy(row, from, size_t(work.width));
    }
    row = nullptr;
    if (i >= end || work.rows[i] < 0 || (work.rows[i] >> work.stretch & (work.owners - 1)) != owner) continue;
    row = work.chunks.at(work.rows[i]);
    for (int64_t at = 0; at < fetched; at += 64) __builtin_prefetch(row + at, 1, 2);
  }
#if defined(__SSE2__)
  if (work.past_caches) _mm_sfence();
#endif
}

}  // namespace

extern const StoreLookupKernels store_lookup;
const StoreLookupKernels store_lookup = {&find, &gather, &scatter};

}  // namespace mk::cpu::MK_LEVEL
