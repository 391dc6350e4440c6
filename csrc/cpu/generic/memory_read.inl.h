// memory_read: read[r] = sum_n weights[r][n] memory[n];  backward: dmemory[n] = sum_r weights[r][n] dread[r],
// dweights[r][n] = memory[n] . dread[r]
//
// A task owns a fixed range of rows of one batch entry; its forward sums go to its own slot, so no two tasks write the
// same place. Bytes per memory element: forward reads 1, backward reads 1 and writes 1, for any number of heads up to a
// head block in registers. Precision: products and sums in the accumulation type (float, double for double); rounded to
// the storage type once.
#include "cpu/memory_read.h"

namespace mk::cpu::MK_LEVEL {
namespace {

constexpr int64_t kTileRows = 64;  // rows that stay in the L1 cache while the head blocks pass over them

// sums[H][L * lanes] += weights of H heads times a tile of rows, L vectors wide (the last one short when Part is Tail).
template <class S, int H, int L, class Part>
MK_INLINE void sum_tile(const S* memory, int64_t stride, const acc_t<S>* weights, int64_t rows, acc_t<S>* sums,
                        int64_t sums_stride, Part part) {
  using V = Vec<acc_t<S>>;
  V acc[H][L];
  for (int h = 0; h < H; h++)
    for (int l = 0; l + 1 < L; l++) acc[h][l] = V::load(sums + h * sums_stride + l * V::kLanes);
  for (int h = 0; h < H; h++) acc[h][L - 1] = load<V>(sums + h * sums_stride + (L - 1) * V::kLanes, part);
  for (int64_t n = 0; n < rows; n++) {
    V row[L];
    for (int l = 0; l + 1 < L; l++) row[l] = V::load(memory + n * stride + l * V::kLanes);
    row[L - 1] = load<V>(memory + n * stride + (L - 1) * V::kLanes, part);
    for (int h = 0; h < H; h++) {
      const V w = V::set1(weights[h * kTileRows + n]);
      for (int l = 0; l < L; l++) acc[h][l] = fma(w, row[l], acc[h][l]);
    }
  }
  for (int h = 0; h < H; h++) {
    for (int l = 0; l + 1 < L; l++) acc[h][l].store(sums + h * sums_stride + l * V::kLanes);
    store(acc[h][L - 1], sums + h * sums_stride + (L - 1) * V::kLanes, part);
  }
}

template <class S, int H>
void sum_heads(const S* memory, int64_t stride, const acc_t<S>* weights, int64_t rows, int64_t width, acc_t<S>* sums) {
  constexpr int64_t kLanes = Vec<acc_t<S>>::kLanes;
  int64_t j = 0;
  for (; j + 4 * kLanes <= width; j += 4 * kLanes)
    sum_tile<S, H, 4>(memory + j, stride, weights, rows, sums + j, width, Full{});
  for (; j + kLanes <= width; j += kLanes)
    sum_tile<S, H, 1>(memory + j, stride, weights, rows, sums + j, width, Full{});
  if (j < width) sum_tile<S, H, 1>(memory + j, stride, weights, rows, sums + j, width, Tail{width - j});
}

template <class S>
void memory_read_sum(const MemoryReadArgs& a, int64_t b, int64_t begin, int64_t end, void* out) {
  using A = acc_t<S>;
  const S* memory = static_cast<const S*>(a.memory) + b * a.memory_b;
  const S* weights = static_cast<const S*>(a.weights) + b * a.weights_b;
  A* sums = static_cast<A*>(out);
  for (int64_t i = 0; i < a.heads * a.width; i++) sums[i] = 0;
  A tile[4 * kTileRows];
  for (int64_t n = begin; n < end; n += kTileRows) {
    const int64_t rows = end - n < kTileRows ? end - n : kTileRows;
    const S* m = memory + n * a.memory_n;
    for (int64_t r = 0; r < a.heads; r += 4) {
      const int64_t heads = a.heads - r < 4 ? a.heads - r : 4;
      for (int64_t h = 0; h < heads; h++) {
        const S* w = weights + (r + h) * a.weights_r + n;
        for_each_vec<Vec<A>>(
            rows, [&](int64_t i, auto part) { store(load<Vec<A>>(w + i, part), tile + h * kTileRows + i, part); });
      }
      A* s = sums + r * a.width;
      switch (heads) {
        case 4:
          sum_heads<S, 4>(m, a.memory_n, tile, rows, a.width, s);
          break;
        case 3:
          sum_heads<S, 3>(m, a.memory_n, tile, rows, a.width, s);
          break;
        case 2:
          sum_heads<S, 2>(m, a.memory_n, tile, rows, a.width, s);
          break;
        default:
          sum_heads<S, 1>(m, a.memory_n, tile, rows, a.width, s);
      }
    }
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
void memory_read_backward(const MemoryReadArgs& a, int64_t b, int64_t begin, int64_t end) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const S* dread = static_cast<const S*>(a.dread) + b * a.dread_b;
  const S* weights = static_cast<const S*>(a.weights) + b * a.weights_b;
  for (int64_t n = begin; n < end; n++) {
    if (a.dmemory) {
      S* out = static_cast<S*>(a.dmemory) + (b * a.rows + n) * a.width;
      for_each_vec<V>(a.width, [&](int64_t j, auto part) {
        V sum = V::zero();
        for (int64_t r = 0; r < a.heads; r++)
          sum = fma(V::set1(A(to_float(weights[r * a.weights_r + n]))), load<V>(dread + r * a.dread_r + j, part), sum);
        store(sum, out + j, part);
      });
    }
    if (a.dweights) {
      const S* row = static_cast<const S*>(a.memory) + b * a.memory_b + n * a.memory_n;
      for (int64_t r = 0; r < a.heads; r++) {
        V sum = V::zero();
        for_each_vec<V>(a.width, [&](int64_t j, auto part) {
          sum = fma(load<V>(row + j, part), load<V>(dread + r * a.dread_r + j, part), sum);
        });
        static_cast<S*>(a.dweights)[(b * a.heads + r) * a.rows + n] = convert<S>::from(reduce_add(sum));
      }
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
