// allocation, host side: checks, the split into tasks, the Python binding.
#include "cpu/allocation.h"

#include "common/arena.h"
#include "common/checks.h"
#include "common/parallel.h"
#include "cpu/select.h"

namespace mk::cpu {
namespace {

constexpr const char* kOp = "allocation";
constexpr int64_t kRowCost = 16;  // a row sorted and multiplied costs as much as this many copied

AllocationArgs arguments(const TensorView& usage, const TensorView& gates, double eps) {
  check_rank(kOp, "usage", usage, 2);
  check_float(kOp, "usage", usage);
  check_inner(kOp, "usage", usage);
  MK_CHECK(usage.size(1) < int64_t(1) << 31, kOp, "usage", "fewer than 2^31 rows", usage.size(1));
  AllocationArgs a{};
  a.rows = usage.size(1), a.heads = 1, a.eps = eps;
  a.usage = usage.data(), a.usage_b = usage.stride(0);
  if (!gates.defined()) return a;
  check_rank(kOp, "write_gates", gates, 2);
  a.heads = gates.size(1);
  check_tensor(kOp, "write_gates", gates, {usage.size(0), a.heads}, usage.dtype());
  check_inner(kOp, "write_gates", gates);
  a.gates = gates.data(), a.gates_b = gates.stride(0);
  return a;
}

template <class Kernel>
void run(const AllocationArgs& a, const TensorView& usage, Kernel kernel, bool backward) {
  const int64_t size = usage.dtype() == DType::float64 ? 8 : 4;
  parallel_for(usage.size(0), grain_for(a.rows * a.heads * size * kRowCost), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    void* room = scratch.take<char>(allocation_scratch(a, size, backward));
    for (int64_t b = begin; b < end; b++) kernel(a, b, room);
  });
}

void forward(const TensorView& out, const InputView& usage, const InputView& gates, double eps) {
  AllocationArgs a = arguments(usage, gates, eps);
  const int64_t batch = usage.size(0);
  const DType type = usage.dtype();
  a.out = gates.defined() ? written(kOp, "out", out, {batch, a.heads, a.rows}, type)
                          : written(kOp, "out", out, {batch, a.rows}, type);
  const auto& kernels = select(allocation_levels);
  pybind11::gil_scoped_release nogil;
  run(a, usage, kernels.forward[int(type)], false);
}

void backward(const TensorView& dusage, const TensorView& dgates, const InputView& dout, const InputView& usage,
              const InputView& gates, double eps) {
  AllocationArgs a = arguments(usage, gates, eps);
  const int64_t batch = usage.size(0);
  const DType type = usage.dtype();
  if (gates.defined()) {
    check_tensor(kOp, "dout", dout, {batch, a.heads, a.rows}, type);
    a.dout_h = dout.stride(1);
  } else {
    check_tensor(kOp, "dout", dout, {batch, a.rows}, type);
  }
  check_inner(kOp, "dout", dout);
  a.dout = dout.data(), a.dout_b = dout.stride(0);
  a.dusage = written(kOp, "dusage", dusage, {batch, a.rows}, type);
  a.dgates = written(kOp, "dwrite_gates", dgates, {batch, a.heads}, type);
  const auto& kernels = select(allocation_levels);
  pybind11::gil_scoped_release nogil;
  run(a, usage, kernels.backward[int(type)], true);
}

}  // namespace

void bind_allocation(pybind11::module_& m) {
  m.def("allocation", &forward);
  m.def("allocation_backward", &backward);
}

}  // namespace mk::cpu
