#include "common/block_pool.h"

#include <cstddef>
#include <map>
#include <mutex>
#include <vector>
#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace mk::block_pool {
#if defined(__linux__)
namespace {

constexpr size_t kPage = size_t(1) << 21, kSmallPage = 4096;

struct Block {
  size_t bytes;
  bool used;
};

struct Pool {
  std::mutex mutex;
  std::map<void*, Block> taken;
  std::vector<std::pair<void*, size_t>> idle;  // the oldest first
  size_t idle_bytes = 0, limit = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE)) / 16;
};

// Never destroyed: tensors may outlive everything that is. A child of fork finds the lock free.
Pool& pool() {
  static Pool* const only = [] {
    auto* made = new Pool;
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
    return made;
  }();
  return *only;
}

// Fresh memory; what is mapped beyond it, to start on a large page, is given back at once.
void* map_pages(size_t bytes) {
  void* const from = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (from == MAP_FAILED) return nullptr;
  char* const low = static_cast<char*>(from);
  const size_t before = (kPage - reinterpret_cast<uintptr_t>(from) % kPage) % kPage;
  if (before) munmap(low, before);
  if (before < kPage) munmap(low + before + bytes, kPage - before);
  madvise(low + before, bytes, MADV_HUGEPAGE);
  return low + before;
}

void shrink(Pool& p, size_t limit) {
  size_t gone = 0;
  for (; p.idle_bytes > limit; gone++) {
    munmap(p.idle[gone].first, p.idle[gone].second);
    p.idle_bytes -= p.idle[gone].second;
  }
  p.idle.erase(p.idle.begin(), p.idle.begin() + std::ptrdiff_t(gone));
}

}  // namespace

void* take(int64_t wanted) {
  const size_t bytes = (size_t(wanted) + kSmallPage - 1) / kSmallPage * kSmallPage;
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  if (p.limit == 0) return nullptr;
  auto best = p.idle.end();  // the smallest that is large enough, and not wasteful
  for (auto it = p.idle.begin(); it != p.idle.end(); ++it)
    if (it->second >= bytes && it->second - bytes <= bytes / 8 && (best == p.idle.end() || it->second <= best->second))
      best = it;
  if (best == p.idle.end()) {
    void* const fresh = map_pages(bytes);
    if (fresh) p.taken[fresh] = {bytes, false};
    return fresh;
  }
  void* const block = best->first;
  p.taken[block] = {best->second, true};
  p.idle_bytes -= best->second;
  p.idle.erase(best);
  return block;
}

void give_back(void* block) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const auto found = p.taken.find(block);
  const size_t bytes = found->second.bytes;
  p.taken.erase(found);
  if (bytes > p.limit) {
    munmap(block, bytes);
    return;
  }
  p.idle.emplace_back(block, bytes), p.idle_bytes += bytes;
  shrink(p, p.limit);
}

bool used_before(const void* block) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const auto found = p.taken.find(const_cast<void*>(block));
  return found != p.taken.end() && found->second.used;
}

void set_limit(int64_t bytes) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  p.limit = size_t(bytes);
  shrink(p, p.limit);
}

void release() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  shrink(p, 0);
}
#else
void* take(int64_t) { return nullptr; }
void give_back(void*) {}
bool used_before(const void*) { return false; }
void set_limit(int64_t) {}
void release() {}
#endif
}  // namespace mk::block_pool
