// product_key_search, host side: checks, the split into tasks, the Python binding.
#include "cpu/product_key_search.h"

#include "cpu/attention_host.h"
#include "cpu/select.h"

namespace mk::cpu {
namespace {

constexpr const char* kOp = "product_key_search";

ProductKeyArgs arguments(const InputView& query, const InputView& subkeys, int64_t slots) {
  check_rank(kOp, "query", query, 4), check_rank(kOp, "subkeys", subkeys, 4);
  check_float(kOp, "query", query);
  const DType dtype = query.dtype();
  ProductKeyArgs a{};
  a.batch = query.size(0), a.heads = query.size(1), a.width = query.size(3);
  a.count = subkeys.size(2), a.slots = slots;
  a.query = checked(kOp, "query", query, {a.batch, a.heads, 2, a.width}, dtype);
  a.subkeys = checked(kOp, "subkeys", subkeys, {a.heads, 2, a.count, a.width}, dtype);
  MK_CHECK(slots > 0, kOp, "k", "at least 1", slots);
  MK_CHECK(a.count < int64_t(1) << 16, kOp, "subkeys", "fewer than 2^16 subkeys", a.count);
  return a;
}

AttentionTensor slots_tensor(const char* name, const TensorView& t, const ProductKeyArgs& a, DType dtype) {
  if (!t.defined()) return {};
  check_tensor(kOp, name, t, {a.batch, a.heads, a.slots}, dtype);
  check_inner(kOp, name, t);
  return {t.data(), t.stride(0), t.stride(1), 0};
}

void forward(const TensorView& scores, const TensorView& index, const InputView& query, const InputView& subkeys,
             int64_t slots) {
  ProductKeyArgs a = arguments(query, subkeys, slots);
  check_output(kOp, "scores", scores, {a.batch, a.heads, a.slots}, query.dtype());
  check_output(kOp, "index", index, {a.batch, a.heads, a.slots}, DType::int64);
  a.scores = scores.data(), a.chosen = index.data<int64_t>();
  const auto& kernels = select(product_key_search_levels);
  const int type = int(query.dtype());
  pybind11::gil_scoped_release nogil;
  if (a.batch * a.heads == 0) return;
  Scratch scratch;
  a.packed = scratch.take<char>(2 * a.heads * kernels.packed_bytes[type](a));
  const double products = 4.0 * double(a.batch * a.heads) * double(a.count * (a.width + 32));
  run_tasks(2 * a.heads, 2.0 * double(a.heads * a.count * a.width), 64,
            [&](int64_t half, void*) { kernels.pack[type](a, half); });
  const int64_t groups = blocks_of(a.batch, kProductKeyQueries);
  run_tasks(a.heads * groups, products, kernels.scratch[type](a), [&](int64_t task, void* memory) {
    const int64_t begin = task % groups * kProductKeyQueries;
    kernels.forward[type](a, task / groups, begin, std::min(begin + kProductKeyQueries, a.batch), memory);
  });
}

void backward(const TensorView& dquery, const TensorView& dsubkeys, const InputView& dscores, const InputView& query,
              const InputView& subkeys, const InputView& index, int64_t slots) {
  ProductKeyArgs a = arguments(query, subkeys, slots);
  const DType dtype = query.dtype();
  a.dscores = slots_tensor("dscores", dscores, a, dtype);
  a.index = slots_tensor("index", index, a, DType::int64);
  a.dquery = written(kOp, "dquery", dquery, {a.batch, a.heads, 2, a.width}, dtype);
  a.dsubkeys = written(kOp, "dsubkeys", dsubkeys, {a.heads, 2, a.count, a.width}, dtype);
  const auto& kernels = select(product_key_search_levels);
  const int type = int(dtype);
  pybind11::gil_scoped_release nogil;
  Scratch scratch;
  const int64_t chosen = 2 * a.batch * a.heads * a.slots, halves = 2 * a.heads;
  a.parts = scratch.take<int32_t>(chosen), a.distinct = scratch.take<int32_t>(2 * a.batch * a.heads);
  a.given = scratch.take<char>(chosen * sum_size(dtype));
  const int64_t groups = blocks_of(a.batch, kProductKeyQueries);
  const double work = 2.0 * double(chosen) * double(a.width + 16);
  run_tasks(a.heads * groups, work, kernels.gradient_scratch[type](a), [&](int64_t task, void* memory) {
    const int64_t begin = task % groups * kProductKeyQueries;
    kernels.gradient[type](a, task / groups, begin, std::min(begin + kProductKeyQueries, a.batch), memory);
  });
  if (!a.dsubkeys || halves * a.count == 0) return;
  const int64_t wanted = blocks_of(2 * num_threads(), halves);
  const int64_t step = std::max<int64_t>(64, blocks_of(a.count, wanted)), parts = blocks_of(a.count, step);
  run_tasks(halves * parts, work + double(halves * a.count * a.width), kernels.subkeys_scratch[type](a, step),
            [&](int64_t task, void* memory) {
              const int64_t first = task % parts * step;
              kernels.subkeys_gradient[type](a, task / parts, first, std::min(first + step, a.count), memory);
            });
}

}  // namespace

void bind_product_key_search(pybind11::module_& m) {
  m.def("product_key_search", &forward);
  m.def("product_key_search_backward", &backward);
}

}  // namespace mk::cpu
