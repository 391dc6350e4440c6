// memory_read, host side: checks, the split into tasks, the Python binding.
#include "cpu/memory_read.h"

#include "common/arena.h"
#include "common/checks.h"
#include "common/pages.h"
#include "common/parallel.h"
#include "cpu/select.h"

namespace mk::cpu {
namespace {

constexpr const char* kOp = "memory_read";

MemoryReadArgs arguments(const TensorView& memory, const TensorView& weights) {
  check_rank(kOp, "memory", memory, 3);
  check_float(kOp, "memory", memory);
  check_inner(kOp, "memory", memory);
  MemoryReadArgs a{};
  a.batch = memory.size(0), a.rows = memory.size(1), a.width = memory.size(2);
  check_rank(kOp, "weights", weights, 3);
  a.heads = weights.size(1);
  check_tensor(kOp, "weights", weights, {a.batch, a.heads, a.rows}, memory.dtype());
  check_inner(kOp, "weights", weights);
  a.memory = memory.data(), a.memory_b = memory.stride(0), a.memory_n = memory.stride(1);
  a.weights = weights.data(), a.weights_b = weights.stride(0), a.weights_r = weights.stride(1);
  return a;
}

// Rows a task sums. It depends on the sizes of one batch entry only: the order of additions must not change with B or
// the threads.
int64_t chunk_rows(const MemoryReadArgs& a) { return std::max<int64_t>(512, 16 * a.heads); }

void forward(const TensorView& read, const InputView& memory, const InputView& weights) {
  MemoryReadArgs a = arguments(memory, weights);
  check_output(kOp, "read", read, {a.batch, a.heads, a.width}, memory.dtype());
  a.read = read.data();
  const int dtype = int(memory.dtype());
  const auto& kernels = select(memory_read_levels);
  pybind11::gil_scoped_release nogil;
  const int64_t step = chunk_rows(a), chunks = (a.rows + step - 1) / step;
  const int64_t slot = a.heads * a.width * (dtype == 0 ? 8 : 4), item = item_size(memory.dtype());
  Scratch scratch;
  char* sums = scratch.take<char>(a.batch * chunks * slot);
  parallel_for(a.batch * chunks, grain_for(std::min(step, a.rows) * a.width * item), [&](int64_t begin, int64_t end) {
    Scratch mine;
    void* room = mine.take<char>(read_scratch(a) * (dtype == 0 ? 8 : 4));
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / chunks, first = i % chunks * step;
      kernels.sum[dtype](a, b, first, std::min(first + step, a.rows), sums + i * slot, room);
      if (chunks == 1) kernels.combine[dtype](a, b, sums + i * slot, 1);
    }
  });
  if (chunks == 1) return;
  parallel_for(a.batch, grain_for(chunks * slot), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) kernels.combine[dtype](a, b, sums + b * chunks * slot, chunks);
  });
}

void backward(const TensorView& dmemory, const TensorView& dweights, const InputView& dread, const InputView& memory,
              const InputView& weights) {
  MemoryReadArgs a = arguments(memory, weights);
  check_tensor(kOp, "dread", dread, {a.batch, a.heads, a.width}, memory.dtype());
  check_inner(kOp, "dread", dread);
  a.dread = dread.data(), a.dread_b = dread.stride(0), a.dread_r = dread.stride(1);
  if (dmemory.defined()) check_output(kOp, "dmemory", dmemory, {a.batch, a.rows, a.width}, memory.dtype());
  if (dweights.defined()) check_output(kOp, "dweights", dweights, {a.batch, a.heads, a.rows}, memory.dtype());
  a.dmemory = dmemory.defined() ? dmemory.data() : nullptr;
  a.dweights = dweights.defined() ? dweights.data() : nullptr;
  const int dtype = int(memory.dtype());
  const auto& kernels = select(memory_read_levels);
  pybind11::gil_scoped_release nogil;
  constexpr int64_t kRows = 512;
  if (a.dmemory) prefer_huge_pages(a.dmemory, dmemory.numel() * item_size(memory.dtype()));
  const int64_t blocks = (a.rows + kRows - 1) / kRows;
  parallel_for(a.batch * blocks, grain_for(std::min(kRows, a.rows) * a.width * item_size(memory.dtype())),
               [&](int64_t begin, int64_t end) {
                 Scratch scratch;
                 void* room = scratch.take<char>(read_scratch(a) * (dtype == 0 ? 8 : 4));
                 for (int64_t i = begin; i < end; i++) {
                   const int64_t first = i % blocks * kRows;
                   kernels.backward[dtype](a, i / blocks, first, std::min(first + kRows, a.rows), room);
                 }
               });
}

}  // namespace

void bind_memory_read(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("memory_read", &forward, py::arg("read"), py::arg("memory"), py::arg("weights"));
  m.def("memory_read_backward", &backward, py::arg("dmemory"), py::arg("dweights"), py::arg("dread"), py::arg("memory"),
        py::arg("weights"));
}

}  // namespace mk::cpu
