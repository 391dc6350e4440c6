// What all CUDA kernels here share: element types with their accumulators, 16-byte packs, grids without integer
// division, and a deterministic sum over splits. Kernels are plain templates; launchers take pointers, int64 strides
// and a stream.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.cuh"

namespace mk::cuda {

template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulate<T>::type;

__device__ __forceinline__ double to_acc(double x) { return x; }
__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ float to_acc(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void store(double* p, double x) { *p = x; }
__device__ __forceinline__ void store(float* p, float x) { *p = x; }
__device__ __forceinline__ void store(__half* p, float x) { *p = __float2half_rn(x); }
__device__ __forceinline__ void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }

// V elements that move in one access when V fills 16 bytes.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T at[V];
};

template <class T>
constexpr int kWide = 16 / sizeof(T);

template <int V, class T>
__device__ __forceinline__ Pack<T, V> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}

template <int V, class T>
__device__ __forceinline__ void store_pack(T* p, const acc_t<T> (&values)[V]) {
  Pack<T, V> out;
#pragma unroll
  for (int v = 0; v < V; v++) store(&out.at[v], values[v]);
  *reinterpret_cast<Pack<T, V>*>(p) = out;
}

// Rows of this tensor may be read in 16-byte packs: its start and every row lie on 16 bytes.
template <class T>
inline bool wide_rows(const void* pointer, int64_t stride_a, int64_t stride_b = 0) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride_a % kWide<T> == 0 && stride_b % kWide<T> == 0;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kThreads = 256;
constexpr int64_t kMaxGridX = 65536, kMaxGridYZ = 32768;  // larger sizes are covered by the kernels' stride loops

// Threads of a block laid out as columns x rows, columns a power of two.
inline dim3 block_for(int64_t columns, int most = kThreads) {
  unsigned x = 1;
  while (int64_t(x) < columns && int(x) < most) x *= 2;
  return dim3(x, kThreads / x, 1);
}

inline dim3 grid_for(int64_t blocks_x, int64_t blocks_y, int64_t blocks_z) {
  auto within = [](int64_t n, int64_t most) { return unsigned(n < 1 ? 1 : n < most ? n : most); };
  return dim3(within(blocks_x, kMaxGridX), within(blocks_y, kMaxGridYZ), within(blocks_z, kMaxGridYZ));
}

constexpr int64_t kFanIn = 32;

// out[o, i] = sum over s of partial[o, s, i], in chunks of kFanIn splits, each chunk in order.
template <class A, class Out>
__global__ void sum_splits_kernel(const A* partial, Out* out, int64_t outer, int64_t splits, int64_t inner) {
  const int64_t chunks = splits > 0 ? (splits + kFanIn - 1) / kFanIn : 1;
  for (int64_t o = blockIdx.z; o < outer; o += gridDim.z)
    for (int64_t chunk = blockIdx.y; chunk < chunks; chunk += gridDim.y)
      for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < inner;
           i += int64_t(gridDim.x) * blockDim.x) {
        const int64_t begin = chunk * kFanIn, end = begin + kFanIn < splits ? begin + kFanIn : splits;
        A sum = 0;
#pragma unroll 8
        for (int64_t s = begin; s < end; s++) sum += partial[(o * splits + s) * inner + i];
        store(&out[(o * chunks + chunk) * inner + i], sum);
      }
}

// Accumulators that sum_splits needs for `splits` partial sums and the levels above them.
inline int64_t scratch_for(int64_t outer, int64_t splits, int64_t inner) {
  int64_t total = outer * splits * inner;
  while (splits > kFanIn) total += outer * (splits = ceil_div(splits, kFanIn)) * inner;
  return total;
}

// The same bits on every run: a tree whose shape depends on the sizes alone, no atomics. splits = 0 writes zeros.
template <class A, class Out>
cudaError_t sum_splits(A* partial, Out* out, int64_t outer, int64_t splits, int64_t inner, cudaStream_t stream) {
  const dim3 block(kThreads, 1, 1);
  while (splits > kFanIn) {
    const int64_t chunks = ceil_div(splits, kFanIn);
    A* next = partial + outer * splits * inner;
    launch(sum_splits_kernel<A, A>, grid_for(ceil_div(inner, kThreads), chunks, outer), block, stream, partial, next,
           outer, splits, inner);
    partial = next;
    splits = chunks;
  }
  return launch(sum_splits_kernel<A, Out>, grid_for(ceil_div(inner, kThreads), 1, outer), block, stream, partial, out,
                outer, splits, inner);
}

}  // namespace mk::cuda
