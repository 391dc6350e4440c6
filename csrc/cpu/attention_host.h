// What the host sides of the attention family share: argument checks, the split into tasks, and the backward of keys
// and queries.
#pragma once
#include <algorithm>
#include <cmath>

#include "common/checks.h"
#include "common/pages.h"
#include "common/tasks.h"
#include "cpu/attention.h"

namespace mk::cpu {

// Few queries leave one task a head: their keys are split into runs of a fixed length, whatever the number of threads.
constexpr int64_t kFewQueries = 64, kRunKeys = 4096;

inline AttentionTensor checked(const char* op, const char* name, const TensorView& t,
                               std::initializer_list<int64_t> sizes, DType dtype) {
  if (!t.defined()) return {};
  check_tensor(op, name, t, sizes, dtype);
  if (t.ndim() == 4) check_inner(op, name, t);
  return {t.data(), t.stride(0), t.stride(1), t.stride(2)};
}

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

// The gradient of an additive mask has a place for every score, or is summed over what it broadcasts to.
inline bool mask_is_full(const AttentionArgs& a) {
  return a.mask_batch == a.batch && a.mask_heads == a.heads && a.mask_queries == a.queries && a.mask_keys == a.keys;
}

inline void keys_and_queries(const AttentionArgs& a, const AttentionKernels& kernels, int type) {
  const bool dkv = a.dkey || a.dvalue, full = a.dmask && mask_is_full(a), dquery = a.dquery;
  const int64_t rows = a.batch * a.key_heads, bytes = kernels.backward_scratch[type](a);
  const double flops = 2.5 * work(a);
  if (!dkv && !full && !dquery) return;
  const bool together = dquery && (dkv || full) && (a.splits > 1 || rows >= num_threads());
  if (together || (dquery && a.splits > 1)) {
    run_tasks_apart(rows * a.splits, flops, bytes, [&](int64_t task, void* scratch) {
      const int64_t row = task / a.splits, run = task % a.splits, first = run * a.split_keys;
      const int64_t last = std::min(first + a.split_keys, a.keys), b = row / a.key_heads;
      AttentionArgs room;
      kernels.backward[type](entry_of(a, b, room),
                             {b, row % a.key_heads, first, last, 0, a.queries, run, true, dkv, full, false}, scratch);
    });
    return;
  }
  // Too few heads for the threads: keys and queries are owned by different tasks, which add up in the same order as
  // above.
  const auto chunk = [&](int64_t n, int64_t block) {
    const int64_t wanted = blocks_of(4 * num_threads(), std::max<int64_t>(rows, 1));
    return std::max<int64_t>(1, blocks_of(blocks_of(n, block), wanted)) * block;
  };
  const int64_t key_step = chunk(a.keys, kernels.key_block), query_step = chunk(a.queries, kernels.query_block);
  const int64_t key_tasks = dkv || full ? blocks_of(a.keys, key_step) : 0,
                query_tasks = dquery ? blocks_of(a.queries, query_step) : 0;
  run_tasks(rows * (key_tasks + query_tasks), flops, bytes, [&](int64_t task, void* scratch) {
    const int64_t row = task % rows, part = task / rows, b = row / a.key_heads, h = row % a.key_heads;
    AttentionArgs room;
    const AttentionArgs& entry = entry_of(a, b, room);
    if (part < key_tasks) {
      const int64_t first = part * key_step, last = std::min(first + key_step, a.keys);
      kernels.backward[type](entry, {b, h, first, last, 0, a.queries, 0, false, dkv, full, false}, scratch);
    } else {
      const int64_t begin = (part - key_tasks) * query_step, end = std::min(begin + query_step, a.queries);
      kernels.backward[type](entry, {b, h, 0, a.keys, begin, end, 0, true, false, false, false}, scratch);
    }
  });
}

// A kernel that takes queries of one entry and head, over all of them.
template <class Kernel>
void over_queries(const AttentionArgs& a, const AttentionKernels& kernels, int type, const Kernel& kernel) {
  const int64_t step = kernels.query_block, steps = blocks_of(a.queries, step), rows = a.batch * a.heads;
  run_tasks(rows * steps, work(a), kernels.backward_scratch[type](a), [&](int64_t task, void* scratch) {
    const int64_t row = task / steps, begin = task % steps * step, b = row / a.heads;
    AttentionArgs room;
    kernel(entry_of(a, b, room), b, row % a.heads, begin, std::min(begin + step, a.queries), scratch);
  });
}

inline void restate(AttentionArgs& a, const AttentionKernels& kernels, int type) {
  a.restate_beyond = kernels.restate_beyond[type](a);
  if (!std::isinf(a.restate_beyond)) over_queries(a, kernels, type, kernels.restate[type]);
}

}  // namespace mk::cpu
