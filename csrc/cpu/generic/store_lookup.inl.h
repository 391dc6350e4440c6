// store_lookup: a key or a row is some cache lines at a random place, so those of the elements further on are on their
// way while one is looked at. A key that its bucket passed on waits in a list, whose next buckets are fetched a group
// at a time and looked at when the list is full. Per batch of 65,536 keys, 10M in the table at load 0.75: misses
// took 1.45 ms with the next buckets awaited group by group, 0.77 ms with a list fetched key by key, 0.5 ms with this
// one; hits 0.54 and 0.46, where their home buckets alone take 0.33.
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

class Finder {
 public:
  Finder(const Table& table, const uint64_t* keys, int64_t* rows) : table_(table), keys_(keys), rows_(rows) {}

  void run(int64_t begin, int64_t end) {
    int64_t homes[kAhead];
    const auto fetch = [&](int64_t i) {
      homes[i % kAhead] = home_of(keys_[i], table_.buckets);
      __builtin_prefetch(table_.at(homes[i % kAhead]), 0, 2);
    };
    for (int64_t i = begin; i < std::min(end, begin + kAhead); i++) fetch(i);
    for (int64_t first = begin; first < end; first += kGroup) {
      for (int64_t i = first; i < std::min(end, first + kGroup); i++) {
        const int64_t home = homes[i % kAhead];
        fetch(std::min(i + kAhead, end - 1));
        look(i, home, home);
      }
      fetch_next();
      while (count_ > kMost - kGroup) next_buckets();
    }
    while (count_) next_buckets();
  }

 private:
  static constexpr int64_t kGroup = 32, kMost = 128;

  // Looks for key i in a bucket; where the bucket passed keys on, it goes to the end of the list. No branch: which key
  // is passed on cannot be predicted.
  void look(int64_t i, int64_t bucket, int64_t home) {
    const uint64_t* words = table_.at(bucket);
    const uint32_t found = places_of(words, keys_[i]);
    const int64_t next = table_.wrapped(bucket + 1);
    rows_[i] = found ? row_at(words, lowest(found)) : -1;
    passed_[count_] = {i, next};
    count_ += !found & (passed_of(words) != 0) & (next != home);
  }

  void fetch_next() {
    for (; fetched_ < count_; fetched_++) __builtin_prefetch(table_.at(passed_[fetched_].bucket), 0, 2);
  }

  void next_buckets() {
    const int64_t before = count_;
    count_ = fetched_ = 0;
    for (int64_t k = 0; k < before; k++) {
      const Passed one = passed_[k];
      look(one.i, one.bucket, home_of(keys_[one.i], table_.buckets));
    }
    fetch_next();
  }

  const Table table_;
  const uint64_t* const keys_;
  int64_t* const rows_;
  Passed passed_[kMost + 1];
  int64_t count_ = 0, fetched_ = 0;  // keys in the list, and how many of their next buckets are on their way
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
