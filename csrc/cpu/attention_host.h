// What the host sides of the attention ops share: how keys are split, sizes of sums, and how tasks are dealt out.
#pragma once
#include <algorithm>
#include <atomic>

#include "common/arena.h"
#include "common/parallel.h"
#include "common/tensor_view.h"
#include "cpu/attention.h"

namespace mk::cpu {
namespace {

// Few queries leave one task a head: their keys are split into runs of a fixed length, whatever the number of threads.
constexpr int64_t kFewQueries = 64, kRunKeys = 4096;

inline DType wide(DType dtype) { return dtype == DType::float64 ? dtype : DType::float32; }
inline int64_t sum_size(DType dtype) { return dtype == DType::float64 ? 8 : 4; }
inline int64_t blocks_of(int64_t n, int64_t step) { return (n + step - 1) / step; }
// Sums lie in whole vectors; 16 elements are a multiple of every level's.
inline int64_t padded16(int64_t n) { return (n + 15) / 16 * 16; }

inline void set_splits(AttentionArgs& a) {
  const bool few = a.queries <= kFewQueries && a.keys >= 2 * kRunKeys;
  a.splits = few ? blocks_of(a.keys, kRunKeys) : 1;
  a.split_keys = few ? kRunKeys : std::max<int64_t>(a.keys, 1);
}

inline double work(const AttentionArgs& a) {
  return 2.0 * double(a.batch * a.heads) * double(a.queries * a.keys) * double(a.width + a.value_width + 16);
}

// Tasks are taken one by one, so threads that other work slows down take fewer; who runs a task changes no bit of it.
template <class Body>
void run_tasks(int64_t tasks, double flops, int64_t scratch_bytes, const Body& body) {
  if (tasks == 0) return;
  std::atomic<int64_t> next{0};
  const int64_t workers = flops < 2e5 ? 1 : std::min<int64_t>(tasks, num_threads());
  parallel_for(workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; worker++) {
      Scratch scratch;
      char* memory = scratch.take<char>(scratch_bytes);
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(task, memory);
    }
  });
}

}  // namespace
}  // namespace mk::cpu
