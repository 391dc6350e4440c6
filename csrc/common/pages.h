// Fresh large outputs cost a page fault every 4 kB; asked for 2 MB pages, the kernel takes one fault for 512 of them.
// Measured for 67 MB of gradients, CPU time: 30 ms to first-touch and fill in small pages, 17 ms in huge ones, 10 ms
// when the pages are there. Non-temporal stores gained 20% of such a fill on reused memory and nothing on fresh memory;
// where reads of as many bytes run beside the writes (attention_few.inl.h) they gained 35% and 10%.
// Two threads on one fresh 2 MB page both clear it: tasks.h keeps them apart. MADV_POPULATE_WRITE gained nothing over
// the faults.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "common/block_pool.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace mk {

// Advice for the whole 2 MB pages inside [data, data + bytes); memory already in small pages keeps them.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kPage * kPage;
  if (bytes >= int64_t(2 * kPage) && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// True: the block reads as zero now, and its pages come, huge, when they are first written. What is left unwritten
// costs no time and no memory. Memory that malloc has just mapped, as it does for any block of 32 MB or more, has
// nothing to give back; elsewhere it is exchanged for fresh pages. False where that cannot be had: the block is as it
// was, or holds anything; and for a block of block_pool.h whose pages are there: writing zeros is less than what they
// cost.
inline bool clear_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  if (block_pool::used_before(data)) return false;
  constexpr uintptr_t kPage = 4096;
  constexpr int64_t kLeast = int64_t(32) << 20;
  if (bytes < kLeast || sysconf(_SC_PAGESIZE) > int64_t(kPage)) return false;
  char* const from = static_cast<char*>(data);
  char* const begin = from + (kPage - reinterpret_cast<uintptr_t>(data) % kPage) % kPage;
  char* const end = from + bytes - reinterpret_cast<uintptr_t>(from + bytes) % kPage;
  // Memory shared with somebody would keep what it holds: two bytes tell.
  volatile char *first = begin, *last = end - 1;
  *first = 1, *last = 1;
  if (madvise(begin, size_t(end - begin), MADV_DONTNEED) != 0 || *first || *last) return false;
  std::memset(from, 0, size_t(begin - from));
  std::memset(end, 0, size_t(from + bytes - end));
  prefer_huge_pages(data, bytes);
  return true;
#else
  return (void)data, (void)bytes, false;
#endif
}

// Zeros that nobody reads soon, past the caches: a plain store would read each line first, and push others out.
inline void stream_zeros(void* data, size_t bytes) {
#if defined(__SSE2__)
  char* to = static_cast<char*>(data);
  if (reinterpret_cast<uintptr_t>(data) % 64 == 0 && bytes % 64 == 0) {
    for (size_t at = 0; at < bytes; at += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + at), _mm_setzero_si128());
    return;
  }
#endif
  std::memset(data, 0, bytes);
}

}  // namespace mk
