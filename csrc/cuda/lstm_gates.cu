// lstm_gates: i,f,o = sigmoid(z + p*c'), g = tanh(z_g), c = f*c' + i*g, h = o*tanh(c); o's peephole sees the new cell.
//
// A thread owns V neighbouring columns of one row (forward) or of a run of rows (backward, so that peephole gradients
// add up in its registers). Forward moves 7 elements per output pair (4 gates, cell in; h, c out), backward 12 (4
// gates, cell, dh, dc in; 4 dgates, dcell out). Float32 inside for 2- and 4-byte types, float64 for float64; one
// rounding per stored element. Backward computes the gates and the new cell again instead of reading a rounded copy.
#include "cuda/lstm_gates.h"

#include "cuda/common.cuh"

namespace mk::cuda {
namespace {

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
__device__ __forceinline__ float hyperbolic(float x) { return tanhf(x); }
__device__ __forceinline__ double hyperbolic(double x) { return tanh(x); }

// One column of one row: the gates, the new cell and its tanh.
template <class A>
struct Step {
  A i, f, g, o, c, t;
  __device__ __forceinline__ Step(A zi, A zf, A zg, A zo, A cell, A pi, A pf, A po)
      : i(sigmoid(zi + pi * cell)),
        f(sigmoid(zf + pf * cell)),
        g(hyperbolic(zg)),
        o(0),
        c(f * cell + i * g),
        t(hyperbolic(c)) {
    o = sigmoid(zo + po * c);
  }
};

// Peephole rows of V columns, zero where there is none.
template <class T, int V>
struct Peephole {
  acc_t<T> i[V], f[V], o[V];
  __device__ __forceinline__ Peephole(const void* pointer, int64_t stride, int64_t column) {
    const T* p = static_cast<const T*>(pointer) + column;
#pragma unroll
    for (int v = 0; v < V; v++) {
      i[v] = pointer ? to_acc(p[v]) : acc_t<T>(0);
      f[v] = pointer ? to_acc(p[stride + v]) : acc_t<T>(0);
      o[v] = pointer ? to_acc(p[2 * stride + v]) : acc_t<T>(0);
    }
  }
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(LstmGatesArgs a) {
  using A = acc_t<T>;
  const int64_t rows_step = int64_t(gridDim.y) * blockDim.y, columns_step = int64_t(gridDim.x) * blockDim.x * V;
  for (int64_t j = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) * V; j < a.hidden; j += columns_step) {
    const Peephole<T, V> p(a.peephole, a.peephole_stride, j);
    for (int64_t row = blockIdx.y * int64_t(blockDim.y) + threadIdx.y; row < a.batch; row += rows_step) {
      const T* z = static_cast<const T*>(a.gates) + row * a.gates_stride + j;
      const auto zi = load_pack<V>(z), zf = load_pack<V>(z + a.hidden);
      const auto zg = load_pack<V>(z + 2 * a.hidden), zo = load_pack<V>(z + 3 * a.hidden);
      const auto cell = load_pack<V>(static_cast<const T*>(a.cell) + row * a.cell_stride + j);
      A h[V], c[V];
#pragma unroll
      for (int v = 0; v < V; v++) {
        const Step<A> s(to_acc(zi.at[v]), to_acc(zf.at[v]), to_acc(zg.at[v]), to_acc(zo.at[v]), to_acc(cell.at[v]),
                        p.i[v], p.f[v], p.o[v]);
        h[v] = s.o * s.t;
        c[v] = s.c;
      }
      store_pack<V>(static_cast<T*>(a.h) + row * a.hidden + j, h);
      store_pack<V>(static_cast<T*>(a.c) + row * a.hidden + j, c);
    }
  }
}

// Gradients of the four pre-activations and of the old cell, for one column of one row.
template <class A>
struct StepGradient {
  A i, f, g, o, cell, new_cell;
  __device__ __forceinline__ StepGradient(const Step<A>& s, A cell_old, A dh, A dc, A pi, A pf, A po) : new_cell(s.c) {
    o = dh * s.t * s.o * (1 - s.o);
    const A d = dc + dh * s.o * (1 - s.t * s.t) + o * po;
    i = d * s.g * s.i * (1 - s.i);
    f = d * cell_old * s.f * (1 - s.f);
    g = d * s.i * (1 - s.g * s.g);
    cell = d * s.f + i * pi + f * pf;
  }
};

template <class T, int V>
__device__ __forceinline__ void load_or_zero(acc_t<T> (&out)[V], const void* pointer, int64_t offset) {
  Pack<T, V> pack{};
  if (pointer) pack = load_pack<V>(static_cast<const T*>(pointer) + offset);
#pragma unroll
  for (int v = 0; v < V; v++) out[v] = pointer ? to_acc(pack.at[v]) : acc_t<T>(0);
}

// Split s covers rows [s*rows, (s+1)*rows); its peephole sums go to scratch[s, 3, hidden].
template <class T, int V, bool kPeepholeGradient>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(LstmGatesBackwardArgs a, int64_t splits, int64_t rows) {
  using A = acc_t<T>;
  const int64_t splits_step = int64_t(gridDim.y) * blockDim.y, columns_step = int64_t(gridDim.x) * blockDim.x * V;
  for (int64_t j = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) * V; j < a.hidden; j += columns_step) {
    const Peephole<T, V> p(a.peephole, a.peephole_stride, j);
    for (int64_t split = blockIdx.y * int64_t(blockDim.y) + threadIdx.y; split < splits; split += splits_step) {
      A sum_i[V] = {}, sum_f[V] = {}, sum_o[V] = {};
      const int64_t end = (split + 1) * rows < a.batch ? (split + 1) * rows : a.batch;
      for (int64_t row = split * rows; row < end; row++) {
        const T* z = static_cast<const T*>(a.gates) + row * a.gates_stride + j;
        const auto zi = load_pack<V>(z), zf = load_pack<V>(z + a.hidden);
        const auto zg = load_pack<V>(z + 2 * a.hidden), zo = load_pack<V>(z + 3 * a.hidden);
        const auto cell = load_pack<V>(static_cast<const T*>(a.cell) + row * a.cell_stride + j);
        A dh[V], dc[V], di[V], df[V], dg[V], d_o[V], dcell[V];
        load_or_zero<T, V>(dh, a.dh, row * a.dh_stride + j);
        load_or_zero<T, V>(dc, a.dc, row * a.dc_stride + j);
#pragma unroll
        for (int v = 0; v < V; v++) {
          const A old = to_acc(cell.at[v]);
          const Step<A> s(to_acc(zi.at[v]), to_acc(zf.at[v]), to_acc(zg.at[v]), to_acc(zo.at[v]), old, p.i[v], p.f[v],
                          p.o[v]);
          const StepGradient<A> d(s, old, dh[v], dc[v], p.i[v], p.f[v], p.o[v]);
          di[v] = d.i, df[v] = d.f, dg[v] = d.g, d_o[v] = d.o, dcell[v] = d.cell;
          if (kPeepholeGradient) sum_i[v] += d.i * old, sum_f[v] += d.f * old, sum_o[v] += d.o * d.new_cell;
        }
        if (a.dgates) {
          T* out = static_cast<T*>(a.dgates) + row * 4 * a.hidden + j;
          store_pack<V>(out, di);
          store_pack<V>(out + a.hidden, df);
          store_pack<V>(out + 2 * a.hidden, dg);
          store_pack<V>(out + 3 * a.hidden, d_o);
        }
        if (a.dcell) store_pack<V>(static_cast<T*>(a.dcell) + row * a.hidden + j, dcell);
      }
      if (kPeepholeGradient) {
        A* out = static_cast<A*>(a.scratch) + split * 3 * a.hidden + j;
#pragma unroll
        for (int v = 0; v < V; v++) out[v] = sum_i[v], out[a.hidden + v] = sum_f[v], out[2 * a.hidden + v] = sum_o[v];
      }
    }
  }
}

// Rows of the batch that one thread adds up: at most 256 splits, whatever the device.
int64_t rows_per_split(int64_t batch) { return batch <= 256 ? 1 : ceil_div(batch, 256); }

template <class T, int V>
cudaError_t forward(const LstmGatesArgs& a, cudaStream_t stream) {
  const int64_t columns = a.hidden / V;
  const dim3 block = block_for(columns);
  return launch(forward_kernel<T, V>, grid_for(ceil_div(columns, block.x), ceil_div(a.batch, block.y), 1), block,
                stream, a);
}

template <class T, int V, bool kPeepholeGradient>
cudaError_t backward(const LstmGatesBackwardArgs& a, cudaStream_t stream) {
  const int64_t columns = a.hidden / V, rows = kPeepholeGradient ? rows_per_split(a.batch) : 1;
  const int64_t splits = ceil_div(a.batch, rows);
  const dim3 block = block_for(columns), grid = grid_for(ceil_div(columns, block.x), ceil_div(splits, block.y), 1);
  const cudaError_t error = launch(backward_kernel<T, V, kPeepholeGradient>, grid, block, stream, a, splits, rows);
  if (!kPeepholeGradient || error != cudaSuccess) return error;
  return sum_splits(static_cast<acc_t<T>*>(a.scratch), static_cast<T*>(a.dpeephole), int64_t(1), splits, 3 * a.hidden,
                    stream);
}

template <class T>
cudaError_t forward_any(const LstmGatesArgs& a, cudaStream_t stream) {
  const bool wide = a.hidden % kWide<T> == 0 && wide_rows<T>(a.gates, a.gates_stride) &&
                    wide_rows<T>(a.cell, a.cell_stride) && wide_rows<T>(a.h, 0) && wide_rows<T>(a.c, 0);
  return wide ? forward<T, kWide<T>>(a, stream) : forward<T, 1>(a, stream);
}

template <class T>
cudaError_t backward_any(const LstmGatesBackwardArgs& a, cudaStream_t stream) {
  const bool wide = a.hidden % kWide<T> == 0 && wide_rows<T>(a.gates, a.gates_stride) &&
                    wide_rows<T>(a.cell, a.cell_stride) && wide_rows<T>(a.dh, a.dh_stride) &&
                    wide_rows<T>(a.dc, a.dc_stride) && wide_rows<T>(a.dgates, 0) && wide_rows<T>(a.dcell, 0);
  // Eight columns and their three sums do not fit in the registers of a thread.
  constexpr int kSumWide = kWide<T> < 4 ? kWide<T> : 4;
  if (a.dpeephole) return wide ? backward<T, kSumWide, true>(a, stream) : backward<T, 1, true>(a, stream);
  return wide ? backward<T, kWide<T>, false>(a, stream) : backward<T, 1, false>(a, stream);
}

}  // namespace

int64_t lstm_gates_scratch(int64_t batch, int64_t hidden) {
  return scratch_for(1, ceil_div(batch, rows_per_split(batch)), 3 * hidden);
}

cudaError_t lstm_gates(const LstmGatesArgs& args, DType dtype, cudaStream_t stream) {
  if (args.batch == 0 || args.hidden == 0) return cudaSuccess;
  switch (dtype) {
    case DType::float64:
      return forward_any<double>(args, stream);
    case DType::float32:
      return forward_any<float>(args, stream);
    case DType::bfloat16:
      return forward_any<__nv_bfloat16>(args, stream);
    case DType::float16:
      return forward_any<__half>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t lstm_gates_backward(const LstmGatesBackwardArgs& args, DType dtype, cudaStream_t stream) {
  if (args.hidden == 0 || (args.batch == 0 && !args.dpeephole)) return cudaSuccess;
  switch (dtype) {
    case DType::float64:
      return backward_any<double>(args, stream);
    case DType::float32:
      return backward_any<float>(args, stream);
    case DType::bfloat16:
      return backward_any<__nv_bfloat16>(args, stream);
    case DType::float16:
      return backward_any<__half>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace mk::cuda
