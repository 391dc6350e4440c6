// merge_attention, host side: checks, the split into tasks, the Python binding.
#include "cpu/merge_attention.h"

#include "common/arena.h"
#include "common/checks.h"
#include "common/pages.h"
#include "common/parallel.h"
#include "cpu/select.h"

namespace mk::cpu {
namespace {

constexpr const char* kOp = "merge_attention";

DType sums_of(DType type) { return type == DType::float64 ? type : DType::float32; }

void take_strides(const TensorView& t, int dims, int64_t* strides) {
  for (int axis = 0; axis < dims; axis++) strides[axis] = t.stride(axis);
}

MergeArgs arguments(const TensorView& outs, const TensorView& lses) {
  check_rank(kOp, "outs", outs, 5);
  check_float(kOp, "outs", outs);
  check_inner(kOp, "outs", outs);
  check_tensor(kOp, "lses", lses, {outs.size(0), outs.size(1), outs.size(2), outs.size(3)}, sums_of(outs.dtype()));
  MergeArgs a{};
  a.parts = outs.size(0), a.heads = outs.size(2), a.queries = outs.size(3), a.width = outs.size(4);
  a.rows = outs.size(1) * a.heads * a.queries;
  a.outs = outs.data(), a.lses = lses.data();
  take_strides(outs, 4, a.outs_stride);
  take_strides(lses, 4, a.lses_stride);
  return a;
}

// Runs body(begin, end, scratch) over all rows.
template <class Body>
void for_rows(const MergeArgs& a, DType type, const Body& body) {
  const int64_t bytes = (2 * a.parts + 1) * (a.width + 1) * item_size(type);
  parallel_for(a.rows, grain_for(bytes), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    body(begin, end, scratch.take<char>(merge_scratch(a.parts) * item_size(sums_of(type))));
  });
}

void forward(const TensorView& out, const TensorView& lse, const InputView& outs, const TensorView& lses) {
  MergeArgs a = arguments(outs, lses);
  const DType type = outs.dtype();
  check_output(kOp, "out", out, {outs.size(1), a.heads, a.queries, a.width}, type);
  check_output(kOp, "lse", lse, {outs.size(1), a.heads, a.queries}, sums_of(type));
  a.out = out.data(), a.lse = lse.data();
  const auto& kernels = select(merge_attention_levels);
  pybind11::gil_scoped_release nogil;
  prefer_huge_pages(a.out, out.numel() * item_size(type));
  for_rows(a, type, [&](int64_t begin, int64_t end, void* room) { kernels.forward[int(type)](a, begin, end, room); });
}

void backward(const TensorView& douts, const TensorView& dlses, const InputView& dout, const TensorView& dlse,
              const InputView& outs, const TensorView& lses) {
  MergeArgs a = arguments(outs, lses);
  const DType type = outs.dtype(), sums = sums_of(type);
  const int64_t batch = outs.size(1);
  if (dout.defined()) {
    check_tensor(kOp, "dout", dout, {batch, a.heads, a.queries, a.width}, type);
    check_inner(kOp, "dout", dout);
    a.dout = dout.data();
    take_strides(dout, 3, a.dout_stride);
  }
  if (dlse.defined()) {
    check_tensor(kOp, "dlse", dlse, {batch, a.heads, a.queries}, sums);
    a.dlse = dlse.data();
    take_strides(dlse, 3, a.dlse_stride);
  }
  if (douts.defined()) {
    check_output(kOp, "douts", douts, {a.parts, batch, a.heads, a.queries, a.width}, type);
    a.douts = douts.data();
  }
  if (dlses.defined()) {
    check_output(kOp, "dlses", dlses, {a.parts, batch, a.heads, a.queries}, sums);
    a.dlses = dlses.data();
  }
  const auto& kernels = select(merge_attention_levels);
  pybind11::gil_scoped_release nogil;
  if (a.douts) prefer_huge_pages(a.douts, outs.numel() * item_size(type));
  for_rows(a, type, [&](int64_t begin, int64_t end, void* room) { kernels.backward[int(type)](a, begin, end, room); });
}

}  // namespace

void bind_merge_attention(pybind11::module_& m) {
  m.def("merge_attention", &forward);
  m.def("merge_attention_backward", &backward);
}

}  // namespace mk::cpu
