// location_address, host side: checks, the split into tasks, the Python binding.
#include "cpu/location_address.h"

#include "common/arena.h"
#include "common/checks.h"
#include "common/parallel.h"
#include "cpu/select.h"

namespace mk::cpu {
namespace {

constexpr const char* kOp = "location_address";

LocationAddressArgs arguments(const TensorView& content, const TensorView& previous, const TensorView& gate,
                              const TensorView& shift, const TensorView& sharpen, const TensorView& stats) {
  check_rank(kOp, "content", content, 3);
  check_float(kOp, "content", content);
  check_inner(kOp, "content", content);
  LocationAddressArgs a{};
  const DType type = content.dtype();
  a.batch = content.size(0), a.heads = content.size(1), a.rows = content.size(2);
  check_tensor(kOp, "previous", previous, {a.batch, a.heads, a.rows}, type);
  check_inner(kOp, "previous", previous);
  check_tensor(kOp, "gate", gate, {a.batch, a.heads}, type);
  check_rank(kOp, "shift", shift, 3);
  a.taps = shift.size(2);
  MK_CHECK(a.taps % 2 == 1, kOp, "shift", "an odd number of taps", a.taps);
  check_tensor(kOp, "shift", shift, {a.batch, a.heads, a.taps}, type);
  check_inner(kOp, "shift", shift);
  check_tensor(kOp, "sharpen", sharpen, {a.batch, a.heads}, type);
  check_output(kOp, "stats", stats, {a.batch, a.heads, 2}, type == DType::float64 ? type : DType::float32);
  a.content = content.data(), a.content_b = content.stride(0), a.content_r = content.stride(1);
  a.previous = previous.data(), a.previous_b = previous.stride(0), a.previous_r = previous.stride(1);
  a.gate = gate.data(), a.gate_b = gate.stride(0), a.gate_r = gate.stride(1);
  a.shift = shift.data(), a.shift_b = shift.stride(0), a.shift_r = shift.stride(1);
  a.sharpen = sharpen.data(), a.sharpen_b = sharpen.stride(0), a.sharpen_r = sharpen.stride(1);
  a.stats = stats.data();
  return a;
}

// Runs kernel(a, b, r, scratch) for every head of every batch entry.
template <class Kernel>
void for_each_head(const LocationAddressArgs& a, DType type, const Kernel& kernel) {
  constexpr int64_t kFunctions = 16;  // a logarithm and an exponential take the time of moving this many elements
  const int64_t bytes = a.rows * (kFunctions + 2 * a.taps) * item_size(type);
  parallel_for(a.batch * a.heads, grain_for(bytes), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    void* room = scratch.take<char>(location_scratch(a.rows, a.taps) * (type == DType::float64 ? 8 : 4));
    for (int64_t i = begin; i < end; i++) kernel(a, i / a.heads, i % a.heads, room);
  });
}

void forward(const TensorView& weights, const TensorView& stats, const InputView& content, const InputView& previous,
             const TensorView& gate, const InputView& shift, const TensorView& sharpen) {
  LocationAddressArgs a = arguments(content, previous, gate, shift, sharpen, stats);
  check_output(kOp, "weights", weights, {a.batch, a.heads, a.rows}, content.dtype());
  a.weights = weights.data();
  const DType type = content.dtype();
  const auto& kernels = select(location_address_levels);
  pybind11::gil_scoped_release nogil;
  for_each_head(a, type, kernels.forward[int(type)]);
}

void backward(const TensorView& dcontent, const TensorView& dprevious, const TensorView& dgate,
              const TensorView& dshift, const TensorView& dsharpen, const InputView& dweights, const InputView& content,
              const InputView& previous, const TensorView& gate, const InputView& shift, const TensorView& sharpen,
              const TensorView& weights, const TensorView& stats) {
  LocationAddressArgs a = arguments(content, previous, gate, shift, sharpen, stats);
  const DType type = content.dtype();
  check_output(kOp, "weights", weights, {a.batch, a.heads, a.rows}, type);
  a.weights = weights.data();
  check_tensor(kOp, "dweights", dweights, {a.batch, a.heads, a.rows}, type);
  check_inner(kOp, "dweights", dweights);
  a.dweights = dweights.data(), a.dweights_b = dweights.stride(0), a.dweights_r = dweights.stride(1);
  const auto output = [&](const char* name, const TensorView& t, std::initializer_list<int64_t> sizes) -> void* {
    if (!t.defined()) return nullptr;
    check_output(kOp, name, t, sizes, type);
    return t.data();
  };
  a.dcontent = output("dcontent", dcontent, {a.batch, a.heads, a.rows});
  a.dprevious = output("dprevious", dprevious, {a.batch, a.heads, a.rows});
  a.dgate = output("dgate", dgate, {a.batch, a.heads});
  a.dshift = output("dshift", dshift, {a.batch, a.heads, a.taps});
  a.dsharpen = output("dsharpen", dsharpen, {a.batch, a.heads});
  const auto& kernels = select(location_address_levels);
  pybind11::gil_scoped_release nogil;
  for_each_head(a, type, kernels.backward[int(type)]);
}

}  // namespace

void bind_location_address(pybind11::module_& m) {
  m.def("location_address", &forward);
  m.def("location_address_backward", &backward);
}

}  // namespace mk::cpu
