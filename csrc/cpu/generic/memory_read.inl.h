// memory_read: read[r] = sum_n weights[r][n] memory[n];  backward: dmemory[n] = sum_r weights[r][n] dread[r],
// dweights[r][n] = memory[n] . dread[r]
//
// A task owns a fixed range of rows of one batch entry and walks it in tiles that stay in the L1 cache while the head
// blocks pass over them; its forward sums go to its own slot, so no two tasks write the same place. Bytes per memory
// element, any number of heads: forward reads 1, backward reads 1 and writes 1. Precision: products and sums in the
// accumulation type (float, double for double); rounded to the storage type once.
#include "cpu/generic/rows.inl.h"
#include "cpu/memory_read.h"

namespace mk::cpu::MK_LEVEL {
namespace {

// What a task keeps beside its tile: weights (or dot products) [R][kTile], dread [R][W], the rows of a tile.
template <class S>
struct ReadScratch {
  acc_t<S>*weights, *dread;
  int32_t* index;
  MK_INLINE ReadScratch(const MemoryReadArgs& a, void* memory) {
    weights = static_cast<acc_t<S>*>(memory), dread = weights + a.heads * kTile;
    index = reinterpret_cast<int32_t*>(dread + a.heads * a.width);
    for (int64_t i = 0; i < kTile; i++) index[i] = int32_t(i);
  }
};

template <class S>
MK_INLINE Rows<S> read_tile(const MemoryReadArgs& a, int64_t b, int64_t n, int64_t end, const int32_t* index) {
  const S* rows = static_cast<const S*>(a.memory) + b * a.memory_b + n * a.memory_n;
  const bool more = n + (kAhead + 1) * kTile <= a.rows;  // of the next task too: it mostly follows on this thread
  const int64_t count = end - n < kTile ? end - n : kTile;
  return {rows, a.memory_n, index, count, a.width, more ? rows + kAhead * kTile * a.memory_n : nullptr, true};
}

template <class S>
MK_INLINE void widen_weights(const MemoryReadArgs& a, int64_t b, int64_t n, int64_t rows, acc_t<S>* out) {
  using V = Vec<acc_t<S>>;
  const S* weights = static_cast<const S*>(a.weights) + b * a.weights_b + n;
  for (int64_t r = 0; r < a.heads; r++)
    for_each_vec<V>(rows, [&](int64_t i, auto part) {
      store(load<V>(weights + r * a.weights_r + i, part), out + r * kTile + i, part);
    });
}

template <class S>
void memory_read_sum(const MemoryReadArgs& a, int64_t b, int64_t begin, int64_t end, void* out, void* scratch) {
  ReadScratch<S> t(a, scratch);
  acc_t<S>* sums = static_cast<acc_t<S>*>(out);
  for (int64_t i = 0; i < a.heads * a.width; i++) sums[i] = 0;
  for (int64_t n = begin; n < end; n += kTile) {
    const Rows<S> tile = read_tile<S>(a, b, n, end, t.index);
    widen_weights<S>(a, b, n, tile.count, t.weights);
    add_rows<S>(tile, a.heads, t.weights, sums);
  }
}

template <class S>
void memory_read_combine(const MemoryReadArgs& a, int64_t b, const void* chunk_sums, int64_t chunks) {
  using V = Vec<acc_t<S>>;
  const int64_t n = a.heads * a.width;
  const acc_t<S>* sums = static_cast<const acc_t<S>*>(chunk_sums);
  S* read = static_cast<S*>(a.read) + b * n;
  for_each_vec<V>(n, [&](int64_t i, auto part) {
    V total = V::zero();
    for (int64_t c = 0; c < chunks; c++) total = total + load<V>(sums + c * n + i, part);
    store(total, read + i, part);
  });
}

template <class S>
void memory_read_backward(const MemoryReadArgs& a, int64_t b, int64_t begin, int64_t end, void* scratch) {
  using A = acc_t<S>;
  using V = Vec<A>;
  ReadScratch<S> t(a, scratch);
  widen_rows(static_cast<const S*>(a.dread) + b * a.dread_b, a.dread_r, a.heads, a.width, t.dread);
  for (int64_t n = begin; n < end; n += kTile) {
    const Rows<S> tile = read_tile<S>(a, b, n, end, t.index);
    if (a.dmemory) {
      widen_weights<S>(a, b, n, tile.count, t.weights);
      const Outer<A> from_read{t.weights, t.dread}, none{nullptr, nullptr};
      mix_rows<S>(tile, a.heads, from_read, none, nullptr, static_cast<S*>(a.dmemory) + (b * a.rows + n) * a.width);
    }
    if (!a.dweights) continue;
    dot_rows<S, Dot::plain>(tile, a.heads, t.dread, t.weights);
    for (int64_t r = 0; r < a.heads; r++) {
      S* out = static_cast<S*>(a.dweights) + (b * a.heads + r) * a.rows + n;
      for_each_vec<V>(tile.count,
                      [&](int64_t i, auto part) { store(load<V>(t.weights + r * kTile + i, part), out + i, part); });
    }
  }
}

}  // namespace

const MemoryReadKernels memory_read = {
    MK_FLOAT_TYPES(memory_read_sum),
    MK_FLOAT_TYPES(memory_read_combine),
    MK_FLOAT_TYPES(memory_read_backward),
};

}  // namespace mk::cpu::MK_LEVEL
