// Enough of CUDA to run this package's kernels on the CPU, one fiber a thread: tests their indexing and arithmetic
// without a GPU. Lanes of a warp meet at every shuffle; a warp whose lanes disagree on how many shuffles they take is
// an error, as on the device.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }

inline dim3 blockIdx, threadIdx, blockDim, gridDim;

namespace emulation {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool finished = false;
};
inline std::vector<Fiber> fibers(1024);
inline ucontext_t scheduler;
inline std::vector<double> slots(2 * 1024);
inline unsigned current = 0, passes = 0;
inline std::function<void()> body;

inline void enter() {
  body();
  fibers[current].finished = true;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; i++) {
    Fiber& f = fibers[i];
    f.finished = false;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  bool running = true;
  for (passes = 0; running; passes++) {
    running = false;
    for (unsigned i = 0; i < threads; i++) {
      if (fibers[i].finished) continue;
      current = i;
      threadIdx = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
      swapcontext(&scheduler, &fibers[i].context);
    }
    for (unsigned i = 0; i < threads; i++) {
      running |= !fibers[i].finished;
      if (fibers[i].finished != fibers[i / 32 * 32].finished) {
        std::fprintf(stderr, "emulation: lanes of a warp left a shuffle at different times\n");
        std::abort();
      }
    }
  }
}

}  // namespace emulation

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
  using namespace emulation;
  const unsigned me = current, slot = passes % 2 * 1024;
  if (mask != 0xffffffffu) std::abort();
  slots[slot + me] = double(value);
  swapcontext(&fibers[me].context, &scheduler);
  return T(slots[slot + (me ^ unsigned(step))]);
}
