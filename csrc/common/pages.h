// Fresh large outputs cost a page fault every 4 kB; asked for 2 MB pages, the kernel takes one fault for 512 of them.
// Measured for 67 MB of gradients, CPU time: 30 ms to first-touch and fill in small pages, 17 ms in huge ones, 10 ms
// when the pages are there. Non-temporal stores gained 20% of such a fill on reused memory and nothing on fresh memory;
// where reads of as many bytes run beside the writes (attention_few.inl.h) they gained 35% and 10%.
// Two threads on one fresh 2 MB page both clear it: tasks.h keeps them apart. MADV_POPULATE_WRITE gained nothing over
// the faults.
#pragma once
#include <cstddef>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
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

}  // namespace mk
