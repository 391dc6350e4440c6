// memory_write, host side: checks, the split into tasks, the Python binding.
#include "cpu/memory_write.h"

#include "common/arena.h"
#include "common/checks.h"
#include "common/pages.h"
#include "common/parallel.h"
#include "cpu/select.h"

namespace mk::cpu {
namespace {

constexpr const char* kOp = "memory_write";
constexpr int64_t kChunk = 512;  // rows a task owns; the same for every batch, thread count and level

MemoryWriteArgs arguments(const TensorView& memory, const TensorView& weights, const TensorView& erase,
                          const TensorView& add) {
  check_rank(kOp, "memory", memory, 3);
  check_float(kOp, "memory", memory);
  check_inner(kOp, "memory", memory);
  MemoryWriteArgs a{};
  a.batch = memory.size(0), a.rows = memory.size(1), a.width = memory.size(2);
  check_rank(kOp, "weights", weights, 3);
  a.heads = weights.size(1);
  check_tensor(kOp, "weights", weights, {a.batch, a.heads, a.rows}, memory.dtype());
  check_inner(kOp, "weights", weights);
  check_tensor(kOp, "erase", erase, {a.batch, a.heads, a.width}, memory.dtype());
  check_inner(kOp, "erase", erase);
  check_tensor(kOp, "add", add, {a.batch, a.heads, a.width}, memory.dtype());
  check_inner(kOp, "add", add);
  a.memory = memory.data(), a.memory_b = memory.stride(0), a.memory_n = memory.stride(1);
  a.weights = weights.data(), a.weights_b = weights.stride(0), a.weights_h = weights.stride(1);
  a.erase = erase.data(), a.erase_b = erase.stride(0), a.erase_h = erase.stride(1);
  a.add = add.data(), a.add_b = add.stride(0), a.add_h = add.stride(1);
  return a;
}

// Runs body(b, chunk, first row, end row, scratch) for every chunk of every batch entry.
template <class Body>
void for_each_chunk(const MemoryWriteArgs& a, DType type, int64_t chunks, const Body& body) {
  const int64_t bytes = std::min(kChunk, a.rows) * a.width * item_size(type) * std::max<int64_t>(1, a.heads);
  parallel_for(a.batch * chunks, grain_for(bytes), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    void* room = scratch.take<char>(write_scratch(a) * (type == DType::float64 ? 8 : 4));
    for (int64_t i = begin; i < end; i++) {
      const int64_t first = i % chunks * kChunk;
      body(i / chunks, i, first, std::min(first + kChunk, a.rows), room);
    }
  });
}

void forward(const TensorView& written, const InputView& memory, const InputView& weights, const InputView& erase,
             const InputView& add) {
  MemoryWriteArgs a = arguments(memory, weights, erase, add);
  check_tensor(kOp, "written", written, {a.batch, a.rows, a.width}, memory.dtype());
  check_inner(kOp, "written", written);
  a.written = written.data(), a.written_b = written.stride(0), a.written_n = written.stride(1);
  const int dtype = int(memory.dtype());
  const auto& kernels = select(memory_write_levels);
  pybind11::gil_scoped_release nogil;
  if (a.written != a.memory) prefer_huge_pages(a.written, written.numel() * item_size(memory.dtype()));
  for_each_chunk(a, memory.dtype(), (a.rows + kChunk - 1) / kChunk,
                 [&](int64_t b, int64_t, int64_t first, int64_t end, void* room) {
                   kernels.forward[dtype](a, b, first, end, room);
                 });
}

void backward(const TensorView& dmemory, const TensorView& dweights, const TensorView& derase, const TensorView& dadd,
              const InputView& dwritten, const InputView& memory, const InputView& weights, const InputView& erase,
              const InputView& add) {
  MemoryWriteArgs a = arguments(memory, weights, erase, add);
  const DType type = memory.dtype();
  check_tensor(kOp, "dwritten", dwritten, {a.batch, a.rows, a.width}, type);
  check_inner(kOp, "dwritten", dwritten);
  a.dwritten = dwritten.data(), a.dwritten_b = dwritten.stride(0), a.dwritten_n = dwritten.stride(1);
  const auto output = [&](const char* name, const TensorView& t, std::initializer_list<int64_t> sizes) -> void* {
    if (!t.defined()) return nullptr;
    check_output(kOp, name, t, sizes, type);
    return t.data();
  };
  a.dmemory = output("dmemory", dmemory, {a.batch, a.rows, a.width});
  a.dweights = output("dweights", dweights, {a.batch, a.heads, a.rows});
  a.derase = output("derase", derase, {a.batch, a.heads, a.width});
  a.dadd = output("dadd", dadd, {a.batch, a.heads, a.width});
  const auto& kernels = select(memory_write_levels);
  pybind11::gil_scoped_release nogil;
  const int64_t chunks = (a.rows + kChunk - 1) / kChunk,
                slot = 2 * a.heads * a.width * (type == DType::float64 ? 8 : 4);
  if (a.dmemory) prefer_huge_pages(a.dmemory, memory.numel() * item_size(type));
  Scratch scratch;
  char* partials = scratch.take<char>(a.batch * chunks * slot);
  for_each_chunk(a, type, chunks, [&](int64_t b, int64_t task, int64_t first, int64_t end, void* room) {
    kernels.backward[int(type)](a, b, first, end, partials + task * slot, room);
    if (chunks == 1) kernels.combine[int(type)](a, b, partials + task * slot, 1);
  });
  if (chunks == 1) return;
  parallel_for(a.batch, grain_for(chunks * slot), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) kernels.combine[int(type)](a, b, partials + b * chunks * slot, chunks);
  });
}

}  // namespace

void bind_memory_write(pybind11::module_& m) {
  m.def("memory_write", &forward);
  m.def("memory_write_backward", &backward);
}

}  // namespace mk::cpu
