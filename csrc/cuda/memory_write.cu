// memory_write: M'[n,w] = M[n,w] * prod_h(1 - s[h,n] e[h,w]) + sum_h s[h,n] a[h,w], with s the write weights.
//
// Forward: a thread owns V neighbouring columns of kRows rows, so erase and add are read once for kRows rows; it moves
// 2 elements per memory element. Backward has two kernels, each reading M and dM' once (5 elements per memory element,
// 3 are the floor): rows_kernel gives dM and ds (lanes of a warp share a row and add up by shuffles), columns_kernel
// gives de and da (a thread owns V columns of a run of rows; runs are summed by sum_splits). Products over the other
// heads are multiplied out, never divided, so a factor of zero is exact. Float32 inside for 2- and 4-byte types,
// float64 for float64; one rounding per stored element.
#include "cuda/memory_write.h"

#include "cuda/common.cuh"

namespace mk::cuda {
namespace {

constexpr int kRows = 4;               // rows of one thread in forward
constexpr int64_t kRowsPerSplit = 64;  // rows of one thread in columns_kernel

// Write weight of head h for one row.
template <class T>
__device__ __forceinline__ acc_t<T> weight(const MemoryWriteArgs& a, int64_t b, int64_t h, int64_t n) {
  return to_acc(
      static_cast<const T*>(a.weights)[b * a.weights_stride_b + h * a.weights_stride_h + n * a.weights_stride_n]);
}
template <int V, class T>
__device__ __forceinline__ void load(acc_t<T> (&out)[V], const T* p) {
  const auto pack = load_pack<V>(p);
#pragma unroll
  for (int v = 0; v < V; v++) out[v] = to_acc(pack.at[v]);
}
template <class T, int V>
__device__ __forceinline__ void load_erase(acc_t<T> (&out)[V], const MemoryWriteArgs& a, int64_t b, int64_t h,
                                           int64_t w) {
  load<V>(out, static_cast<const T*>(a.erase) + b * a.erase_stride_b + h * a.erase_stride_h + w);
}
template <class T, int V>
__device__ __forceinline__ void load_add(acc_t<T> (&out)[V], const MemoryWriteArgs& a, int64_t b, int64_t h,
                                         int64_t w) {
  load<V>(out, static_cast<const T*>(a.add) + b * a.add_stride_b + h * a.add_stride_h + w);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(MemoryWriteArgs a, T* written) {
  using A = acc_t<T>;
  const int64_t tile = int64_t(blockDim.y) * kRows, rows_step = gridDim.y * tile,
                columns_step = int64_t(gridDim.x) * blockDim.x * V;
  for (int64_t b = blockIdx.z; b < a.batch; b += gridDim.z)
    for (int64_t w = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) * V; w < a.width; w += columns_step)
      for (int64_t first = blockIdx.y * tile + threadIdx.y; first < a.rows; first += rows_step) {
        A kept[kRows][V], added[kRows][V] = {};
#pragma unroll
        for (int r = 0; r < kRows; r++) {
          const int64_t n = first + r * int64_t(blockDim.y);
          if (n < a.rows)
            load<V>(kept[r], static_cast<const T*>(a.memory) + b * a.memory_stride_b + n * a.memory_stride_n + w);
        }
        for (int64_t h = 0; h < a.heads; h++) {
          A erase[V], add[V];
          load_erase<T, V>(erase, a, b, h, w);
          load_add<T, V>(add, a, b, h, w);
#pragma unroll
          for (int r = 0; r < kRows; r++) {
            const int64_t n = first + r * int64_t(blockDim.y);
            const A s = n < a.rows ? weight<T>(a, b, h, n) : A(0);
#pragma unroll
            for (int v = 0; v < V; v++) kept[r][v] *= 1 - s * erase[v], added[r][v] += s * add[v];
          }
        }
#pragma unroll
        for (int r = 0; r < kRows; r++) {
          const int64_t n = first + r * int64_t(blockDim.y);
#pragma unroll
          for (int v = 0; v < V; v++) kept[r][v] += added[r][v];
          if (n < a.rows) store_pack<V>(written + (b * a.rows + n) * a.width + w, kept[r]);
        }
      }
}

// out[v] = prod over j != h of (1 - s_j e_j[v]).
template <class T, int V>
__device__ __forceinline__ void other_heads(acc_t<T> (&out)[V], const MemoryWriteArgs& a, int64_t b, int64_t h,
                                            int64_t n, int64_t w) {
#pragma unroll
  for (int v = 0; v < V; v++) out[v] = 1;
  for (int64_t j = 0; j < a.heads; j++) {
    if (j == h) continue;
    const acc_t<T> s = weight<T>(a, b, j, n);
    acc_t<T> erase[V];
    load_erase<T, V>(erase, a, b, j, w);
#pragma unroll
    for (int v = 0; v < V; v++) out[v] *= 1 - s * erase[v];
  }
}

// dM and ds of a row: threadIdx.x runs along the row, blockDim.x is a power of two up to 32, so a row's lanes lie in
// one warp.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2) rows_kernel(MemoryWriteArgs a, MemoryWriteGradients g) {
  using A = acc_t<T>;
  const int64_t rows_step = int64_t(gridDim.y) * blockDim.y;
  for (int64_t b = blockIdx.z; b < a.batch; b += gridDim.z)
    for (int64_t base = blockIdx.y * int64_t(blockDim.y); base < a.rows; base += rows_step) {
      const int64_t n = base + threadIdx.y;
      // The shuffles below need every lane, so a lane without a row runs along with an empty range of columns.
      const int64_t width = n < a.rows ? a.width : 0;
      const T* memory = static_cast<const T*>(a.memory) + b * a.memory_stride_b + n * a.memory_stride_n;
      const T* upstream = static_cast<const T*>(g.dwritten) + b * g.dwritten_stride_b + n * g.dwritten_stride_n;
      for (int64_t w = threadIdx.x * V; g.dmemory && w < width; w += blockDim.x * V) {
        A kept[V], d[V];
        other_heads<T, V>(kept, a, b, -1, n, w);
        load<V>(d, upstream + w);
#pragma unroll
        for (int v = 0; v < V; v++) d[v] *= kept[v];
        store_pack<V>(static_cast<T*>(g.dmemory) + (b * a.rows + n) * a.width + w, d);
      }
      for (int64_t h = 0; g.dweights && h < a.heads; h++) {
        A sum = 0;
        for (int64_t w = threadIdx.x * V; w < width; w += blockDim.x * V) {
          A others[V], erase[V], add[V], m[V], d[V];
          other_heads<T, V>(others, a, b, h, n, w);
          load_erase<T, V>(erase, a, b, h, w);
          load_add<T, V>(add, a, b, h, w);
          load<V>(m, memory + w);
          load<V>(d, upstream + w);
#pragma unroll
          for (int v = 0; v < V; v++) sum += d[v] * (add[v] - m[v] * erase[v] * others[v]);
        }
        for (int step = blockDim.x / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (threadIdx.x == 0 && n < a.rows) store(static_cast<T*>(g.dweights) + (b * a.heads + h) * a.rows + n, sum);
      }
    }
}

// Partial sums over one split of rows: derase and dadd of every head into scratch [batch, splits, heads, width].
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    columns_kernel(MemoryWriteArgs a, MemoryWriteGradients g, acc_t<T>* erase_sums, acc_t<T>* add_sums,
                   int64_t splits) {
  using A = acc_t<T>;
  const int64_t splits_step = int64_t(gridDim.y) * blockDim.y, columns_step = int64_t(gridDim.x) * blockDim.x * V;
  for (int64_t b = blockIdx.z; b < a.batch; b += gridDim.z)
    for (int64_t w = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) * V; w < a.width; w += columns_step)
      for (int64_t split = blockIdx.y * int64_t(blockDim.y) + threadIdx.y; split < splits; split += splits_step) {
        const int64_t begin = split * kRowsPerSplit,
                      end = begin + kRowsPerSplit < a.rows ? begin + kRowsPerSplit : a.rows;
        for (int64_t h = 0; h < a.heads; h++) {
          A derase[V] = {}, dadd[V] = {};
#pragma unroll 2
          for (int64_t n = begin; n < end; n++) {
            const A s = weight<T>(a, b, h, n);
            A others[V], m[V], d[V];
            load<V>(m, static_cast<const T*>(a.memory) + b * a.memory_stride_b + n * a.memory_stride_n + w);
            load<V>(d, static_cast<const T*>(g.dwritten) + b * g.dwritten_stride_b + n * g.dwritten_stride_n + w);
            other_heads<T, V>(others, a, b, h, n, w);
#pragma unroll
            for (int v = 0; v < V; v++) derase[v] -= d[v] * m[v] * s * others[v], dadd[v] += d[v] * s;
          }
          const int64_t at = ((b * splits + split) * a.heads + h) * a.width + w;
#pragma unroll
          for (int v = 0; v < V; v++) erase_sums[at + v] = derase[v], add_sums[at + v] = dadd[v];
        }
      }
}

template <class T>
bool wide_inputs(const MemoryWriteArgs& a) {
  return a.width % kWide<T> == 0 && wide_rows<T>(a.memory, a.memory_stride_b, a.memory_stride_n) &&
         wide_rows<T>(a.erase, a.erase_stride_b, a.erase_stride_h) &&
         wide_rows<T>(a.add, a.add_stride_b, a.add_stride_h);
}

template <class T, int V>
cudaError_t forward(const MemoryWriteArgs& a, T* written, cudaStream_t stream) {
  const int64_t columns = a.width / V;
  const dim3 block = block_for(columns);
  const dim3 grid = grid_for(ceil_div(columns, block.x), ceil_div(a.rows, int64_t(block.y) * kRows), a.batch);
  return launch(forward_kernel<T, V>, grid, block, stream, a, written);
}

template <class T, int V>
cudaError_t backward(const MemoryWriteArgs& a, const MemoryWriteGradients& g, cudaStream_t stream) {
  using A = acc_t<T>;
  const int64_t columns = a.width / V;
  if (g.dmemory || g.dweights) {
    const dim3 block = block_for(columns, 32);
    const cudaError_t error =
        launch(rows_kernel<T, V>, grid_for(1, ceil_div(a.rows, block.y), a.batch), block, stream, a, g);
    if (error != cudaSuccess) return error;
  }
  if (!g.derase && !g.dadd) return cudaSuccess;
  const int64_t splits = ceil_div(a.rows, kRowsPerSplit), inner = a.heads * a.width;
  A* erase_sums = static_cast<A*>(g.scratch);
  A* add_sums = erase_sums + scratch_for(a.batch, splits, inner);
  const dim3 block = block_for(columns);
  const dim3 grid = grid_for(ceil_div(columns, block.x), ceil_div(splits, block.y), a.batch);
  cudaError_t error = launch(columns_kernel<T, V>, grid, block, stream, a, g, erase_sums, add_sums, splits);
  if (error == cudaSuccess && g.derase)
    error = sum_splits(erase_sums, static_cast<T*>(g.derase), a.batch, splits, inner, stream);
  if (error == cudaSuccess && g.dadd)
    error = sum_splits(add_sums, static_cast<T*>(g.dadd), a.batch, splits, inner, stream);
  return error;
}

template <class T>
cudaError_t forward_any(const MemoryWriteArgs& a, void* written, cudaStream_t stream) {
  T* out = static_cast<T*>(written);
  return wide_inputs<T>(a) && wide_rows<T>(written, 0) ? forward<T, kWide<T>>(a, out, stream)
                                                       : forward<T, 1>(a, out, stream);
}

template <class T>
cudaError_t backward_any(const MemoryWriteArgs& a, const MemoryWriteGradients& g, cudaStream_t stream) {
  const bool wide = wide_inputs<T>(a) && wide_rows<T>(g.dwritten, g.dwritten_stride_b, g.dwritten_stride_n) &&
                    wide_rows<T>(g.dmemory, 0);
  return wide ? backward<T, kWide<T>>(a, g, stream) : backward<T, 1>(a, g, stream);
}

}  // namespace

int64_t memory_write_scratch(int64_t batch, int64_t rows, int64_t width, int64_t heads) {
  return 2 * scratch_for(batch, ceil_div(rows, kRowsPerSplit), heads * width);
}

cudaError_t memory_write(const MemoryWriteArgs& args, void* written, DType dtype, cudaStream_t stream) {
  if (args.batch == 0 || args.rows == 0 || args.width == 0) return cudaSuccess;
  switch (dtype) {
    case DType::float64:
      return forward_any<double>(args, written, stream);
    case DType::float32:
      return forward_any<float>(args, written, stream);
    case DType::bfloat16:
      return forward_any<__nv_bfloat16>(args, written, stream);
    case DType::float16:
      return forward_any<__half>(args, written, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t memory_write_backward(const MemoryWriteArgs& args, const MemoryWriteGradients& g, DType dtype,
                                  cudaStream_t stream) {
  if (args.batch == 0) return cudaSuccess;
  switch (dtype) {
    case DType::float64:
      return backward_any<double>(args, g, stream);
    case DType::float32:
      return backward_any<float>(args, g, stream);
    case DType::bfloat16:
      return backward_any<__nv_bfloat16>(args, g, stream);
    case DType::float16:
      return backward_any<__half>(args, g, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace mk::cuda
