// store_lookup: a key or a row is some cache lines at a random place, so those of the elements further on are on their
// way while one is looked at. A key that its bucket passed on waits in a list until there are many of them, whose next
// buckets are under way together: a batch of misses at load 0.75 took 1.45 ms with the next buckets awaited group by
// group, 1.1 ms with the list, 0.9 ms with it and one comparison of all places (65,536 keys, 10M in the table).
//
// Random rows of 256 bytes out of 2.5 GB, cold: 2.1 ms for 65,536 of them, which is what memory gives: 16 to 128 rows
// under way, into the first cache or the second, past the caches or not, all took that to within 10%.
#include <algorithm>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/store_lookup.h"

namespace mk::cpu::MK_LEVEL {
namespace {

using namespace mk::store;

constexpr int64_t kAhead = 32;  // keys, and rows, under way

// Bit i: place i is taken by this key.
inline uint32_t places_of(const uint64_t* bucket, uint64_t key) {
#if defined(__AVX512F__)
  return uint32_t(_mm512_cmpeq_epi64_mask(_mm512_loadu_si512(bucket), _mm512_set1_epi64(int64_t(key)))) &
         meta_of(bucket) & ((1u << kPlaces) - 1);
#else
  return matches(bucket, key);
#endif
}

struct Passed {
  int64_t i, bucket;  // the key's place in the batch, and where it is looked for next
};

struct Finder {
  const Table& table;
  const uint64_t* keys;
  int64_t* rows;
  Passed passed[2 * kAhead];
  int64_t count = 0;

  // Looks for key i in a bucket; where the bucket passed keys on, it goes to the end of the list.
  void look(int64_t i, int64_t bucket, int64_t home) {
    const uint64_t* words = table.at(bucket);
    const uint32_t found = places_of(words, keys[i]);
    const int64_t next = table.wrapped(bucket + 1);
    rows[i] = found ? row_at(words, lowest(found)) : -1;
    const bool on = !found && passed_of(words) && next != home;
    __builtin_prefetch(table.at(on ? next : bucket), 0, 2);
    passed[count] = {i, next};
    count += on;
  }

  void next_buckets() {
    const int64_t before = count;
    count = 0;
    for (int64_t k = 0; k < before; k++) {
      const Passed one = passed[k];
      look(one.i, one.bucket, home_of(keys[one.i], table.buckets));
    }
  }
};

void find(const Table& table, const uint64_t* keys, int64_t* rows, int64_t begin, int64_t end) {
  Finder finder{table, keys, rows, {}, 0};
  int64_t homes[kAhead];
  const auto fetch = [&](int64_t i) {
    homes[i % kAhead] = home_of(keys[i], table.buckets);
    __builtin_prefetch(table.at(homes[i % kAhead]), 0, 2);
  };
  for (int64_t i = begin; i < std::min(end, begin + kAhead); i++) fetch(i);
  for (int64_t i = begin; i < end; i++) {
    const int64_t home = homes[i % kAhead];
    if (i + kAhead < end) fetch(i + kAhead);
    finder.look(i, home, home);
    while (finder.count == 2 * kAhead) finder.next_buckets();
  }
  while (finder.count) finder.next_buckets();
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
