// usage, host side: checks, the split into tasks, the Python binding.
#include "cpu/usage.h"

#include "common/arena.h"
#include "common/checks.h"
#include "common/parallel.h"
#include "cpu/select.h"

namespace mk::cpu {
namespace {

constexpr const char* kOp = "usage";

UsageArgs arguments(const TensorView& usage, const TensorView& write, const TensorView& read, const TensorView& free) {
  check_rank(kOp, "usage", usage, 2);
  check_float(kOp, "usage", usage);
  check_rank(kOp, "write_weights", write, 3);
  check_rank(kOp, "read_weights", read, 3);
  UsageArgs a{};
  const int64_t batch = usage.size(0);
  const DType type = usage.dtype();
  a.rows = usage.size(1), a.write_heads = write.size(1), a.read_heads = read.size(1);
  check_tensor(kOp, "write_weights", write, {batch, a.write_heads, a.rows}, type);
  check_tensor(kOp, "read_weights", read, {batch, a.read_heads, a.rows}, type);
  check_tensor(kOp, "free_gate", free, {batch, a.read_heads}, type);
  check_inner(kOp, "usage", usage);
  check_inner(kOp, "write_weights", write);
  check_inner(kOp, "read_weights", read);
  check_inner(kOp, "free_gate", free);
  a.usage = usage.data(), a.usage_b = usage.stride(0);
  a.write = write.data(), a.write_b = write.stride(0), a.write_h = write.stride(1);
  a.read = read.data(), a.read_b = read.stride(0), a.read_r = read.stride(1);
  a.free = free.data(), a.free_b = free.stride(0);
  return a;
}

int64_t grain(const UsageArgs& a, DType type) {
  return grain_for(a.rows * (a.write_heads + a.read_heads + 2) * item_size(type));
}

void forward(const TensorView& out, const InputView& usage_before, const InputView& write, const InputView& read,
             const InputView& free) {
  UsageArgs a = arguments(usage_before, write, read, free);
  const int64_t batch = usage_before.size(0);
  const DType type = usage_before.dtype();
  check_output(kOp, "out", out, {batch, a.rows}, type);
  a.out = out.data();
  const auto& kernels = select(usage_levels);
  pybind11::gil_scoped_release nogil;
  parallel_for(batch, grain(a, type), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) kernels.forward[int(type)](a, b);
  });
}

void backward(const TensorView& dusage, const TensorView& dwrite, const TensorView& dread, const TensorView& dfree,
              const InputView& dout, const InputView& usage_before, const InputView& write, const InputView& read,
              const InputView& free) {
  UsageArgs a = arguments(usage_before, write, read, free);
  const int64_t batch = usage_before.size(0);
  const DType type = usage_before.dtype();
  check_tensor(kOp, "dout", dout, {batch, a.rows}, type);
  check_inner(kOp, "dout", dout);
  a.dout = dout.data(), a.dout_b = dout.stride(0);
  a.dusage = written(kOp, "dusage", dusage, {batch, a.rows}, type);
  a.dwrite = written(kOp, "dwrite_weights", dwrite, {batch, a.write_heads, a.rows}, type);
  a.dread = written(kOp, "dread_weights", dread, {batch, a.read_heads, a.rows}, type);
  a.dfree = written(kOp, "dfree_gate", dfree, {batch, a.read_heads}, type);
  const auto& kernels = select(usage_levels);
  pybind11::gil_scoped_release nogil;
  parallel_for(batch, grain(a, type), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    void* room = scratch.take<char>(usage_scratch(a) * (type == DType::float64 ? 8 : 4));
    for (int64_t b = begin; b < end; b++) kernels.backward[int(type)](a, b, room);
  });
}

}  // namespace

void bind_usage(pybind11::module_& m) {
  m.def("usage", &forward);
  m.def("usage_backward", &backward);
}

}  // namespace mk::cpu
