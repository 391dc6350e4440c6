// topk_read, host side: checks, the split into tasks, the Python binding.
#include "cpu/topk_read.h"

#include <algorithm>
#include <limits>

#include "cpu/attention_host.h"
#include "cpu/select.h"

namespace mk::cpu {
namespace {

constexpr const char* kOp = "topk_read";
// Up to so many queries of an entry are summed along rows that are read once: a tile would be mostly empty.
constexpr int64_t kFewPerEntry = 8;
constexpr int64_t kLeastRows = 2048;    // of a search, so that its first k are few beside the rest
constexpr int64_t kMostRows = 1 << 16;  // memory rows whose inverse index one task makes

struct Options {
  int64_t slots;
  const std::string& similarity;
  double scale;
  int64_t few;
};

AttentionTensor tensor(const char* name, const TensorView& t, std::initializer_list<int64_t> sizes, DType dtype) {
  if (!t.defined()) return {};
  check_tensor(kOp, name, t, sizes, dtype);
  check_inner(kOp, name, t);
  return {t.data(), t.stride(0), 0, t.stride(1)};
}

TopkArgs arguments(const InputView& query, const InputView& key, const InputView& value, const InputView& mask,
                   const Options& options) {
  check_rank(kOp, "query", query, 3), check_rank(kOp, "key", key, 3), check_rank(kOp, "value", value, 3);
  check_float(kOp, "query", query);
  const DType dtype = query.dtype();
  TopkArgs a{};
  a.batch = query.size(0), a.queries = query.size(1), a.width = query.size(2);
  a.rows = key.size(1), a.value_width = value.size(2);
  a.query = tensor("query", query, {a.batch, a.queries, a.width}, dtype);
  a.key = tensor("key", key, {a.batch, a.rows, a.width}, dtype);
  a.value = tensor("value", value, {a.batch, a.rows, a.value_width}, dtype);
  if (mask.defined()) {
    const AttentionTensor t = tensor("mask", mask, {a.batch, a.rows}, DType::boolean);
    a.mask = static_cast<const bool*>(t.data), a.mask_b = t.b;
  }
  MK_CHECK(a.rows < int64_t(1) << 31, kOp, "key", "fewer than 2^31 rows", a.rows);
  MK_CHECK(options.slots > 0, kOp, "k", "at least 1", options.slots);
  a.slots = options.slots, a.scale = options.scale, a.few = options.few <= kFewPerEntry;
  a.similarity = options.similarity == "dot"      ? TopkArgs::dot
                 : options.similarity == "cosine" ? TopkArgs::cosine
                                                  : TopkArgs::l2;
  return a;
}

template <class A>
void* nothing_reached(Scratch& scratch, const TopkArgs& a) {
  A* reached = scratch.take<A>(a.batch * a.queries);
  std::fill_n(reached, a.batch * a.queries, -std::numeric_limits<A>::infinity());
  return reached;
}

double work(const TopkArgs& a) { return 2.0 * double(a.batch * a.queries) * double(a.rows * (a.width + 4)); }
double chosen_work(const TopkArgs& a) {
  return 2.0 * double(a.batch * a.queries) * double(a.slots) * double(a.width + a.value_width + 64);
}

void forward(const TensorView& read, const TensorView& weights, const TensorView& index, const InputView& query,
             const InputView& key, const InputView& value, const InputView& mask, int64_t slots,
             const std::string& similarity, double scale, int64_t few) {
  TopkArgs a = arguments(query, key, value, mask, {slots, similarity, scale, few});
  check_output(kOp, "read", read, {a.batch, a.queries, a.value_width}, query.dtype());
  check_output(kOp, "weights", weights, {a.batch, a.queries, a.slots}, query.dtype());
  check_output(kOp, "index", index, {a.batch, a.queries, a.slots}, DType::int64);
  a.read = read.data(), a.weights = weights.data(), a.chosen = index.data<int64_t>();
  const auto& kernels = select(topk_read_levels);
  const int type = int(query.dtype());
  pybind11::gil_scoped_release nogil;
  if (a.batch * a.queries == 0) return;
  // The choice is exact, so that the split may go by the number of threads and changes no bit.
  const int64_t groups = blocks_of(a.queries, kTopkQueries);
  const int64_t wanted = blocks_of(4 * num_threads(), a.batch * groups);
  const int64_t least = std::max(kLeastRows, 16 * a.slots);
  const int64_t step = blocks_of(std::max(least, blocks_of(a.rows, wanted)), 64) * 64;
  const int64_t parts = std::max<int64_t>(1, blocks_of(a.rows, step));
  const int64_t pair = kernels.pair_bytes[type](), part_pairs = a.batch * a.queries * a.slots;
  Scratch scratch;
  char* found = scratch.take<char>(parts * part_pairs * pair);
  a.reached =
      query.dtype() == DType::float64 ? nothing_reached<double>(scratch, a) : nothing_reached<float>(scratch, a);
  run_tasks(a.batch * groups * parts, work(a), kernels.search_scratch[type](a), [&](int64_t task, void* memory) {
    const int64_t part = task % parts, b = task / parts / groups, begin = task / parts % groups * kTopkQueries;
    char* to = found + (part * part_pairs + (b * a.queries + begin) * a.slots) * pair;
    kernels.search[type](a, b, begin, std::min(begin + kTopkQueries, a.queries), part * step,
                         std::min((part + 1) * step, a.rows), to, memory);
  });
  constexpr int64_t kTask = 8;  // queries
  const int64_t tasks = blocks_of(a.batch * a.queries, kTask);
  run_tasks(tasks, chosen_work(a), kernels.finish_scratch[type](a, parts), [&](int64_t task, void* memory) {
    for (int64_t i = task * kTask; i < std::min((task + 1) * kTask, a.batch * a.queries); i++)
      kernels.finish[type](a, i / a.queries, i % a.queries, found + i * a.slots * pair, parts, part_pairs, memory);
  });
}

void backward(const TensorView& dquery, const TensorView& dkey, const TensorView& dvalue, const InputView& dread,
              const InputView& dweights, const InputView& query, const InputView& key, const InputView& value,
              const InputView& mask, const InputView& index, int64_t slots, const std::string& similarity, double scale,
              int64_t few) {
  TopkArgs a = arguments(query, key, value, mask, {slots, similarity, scale, few});
  const DType dtype = query.dtype();
  a.dread = tensor("dread", dread, {a.batch, a.queries, a.value_width}, dtype);
  a.dweights = tensor("dweights", dweights, {a.batch, a.queries, a.slots}, dtype);
  a.index = tensor("index", index, {a.batch, a.queries, a.slots}, DType::int64);
  a.dquery = written(kOp, "dquery", dquery, {a.batch, a.queries, a.width}, dtype);
  a.dkey = written(kOp, "dkey", dkey, {a.batch, a.rows, a.width}, dtype);
  a.dvalue = written(kOp, "dvalue", dvalue, {a.batch, a.rows, a.value_width}, dtype);
  const auto& kernels = select(topk_read_levels);
  const int type = int(dtype);
  const bool memory = a.dkey || a.dvalue;
  pybind11::gil_scoped_release nogil;
  Scratch scratch;
  if (memory) a.given = scratch.take<char>(a.batch * a.queries * a.slots * 3 * sum_size(dtype));
  constexpr int64_t kTask = 8;  // queries
  const int64_t tasks = blocks_of(a.batch * a.queries, kTask);
  run_tasks(tasks, 2 * chosen_work(a), kernels.gradient_scratch[type](a), [&](int64_t task, void* room) {
    for (int64_t i = task * kTask; i < std::min((task + 1) * kTask, a.batch * a.queries); i++)
      kernels.gradient[type](a, i / a.queries, i % a.queries, room);
  });
  if (!memory || a.batch * a.rows == 0) return;
  const int64_t wanted = blocks_of(4 * num_threads(), a.batch);
  const int64_t step = std::min(kMostRows, std::max<int64_t>(1024, blocks_of(a.rows, wanted)));
  const int64_t parts = blocks_of(a.rows, step);
  const double moved = double(a.batch) * double(a.rows * (a.width + a.value_width));
  run_tasks(a.batch * parts, moved, kernels.memory_scratch[type](a, step), [&](int64_t task, void* room) {
    const int64_t first = task % parts * step;
    kernels.memory[type](a, task / parts, first, std::min(first + step, a.rows), room);
  });
}

}  // namespace

void bind_topk_read(pybind11::module_& m) {
  m.def("topk_read", &forward);
  m.def("topk_read_backward", &backward);
}

}  // namespace mk::cpu
