// hopfield_retrieve, host side: checks, the split into tasks, the steps, the Python binding. A step is attention of the
// states over the stored patterns, by the kernels of attention; a task runs all steps of a block of queries, so that
// its states stay in the cache while the patterns stream past, and ends early once all its rows have come to rest.
#include <cstring>

#include "cpu/attention_host.h"
#include "cpu/select.h"

namespace mk::cpu {
namespace {

constexpr const char* kOp = "hopfield_retrieve";
// Queries of a task. A multiple of the rows that attention works on at a time, so that it changes no bit.
constexpr int64_t kQueries = 192;

struct Steps {
  AttentionArgs update, read;  // of the patterns and of the values; `query` is that of xi[0] and unscaled
  AttentionTensor beta;        // [B][Q], strides b and row; no data: 1
  int64_t count;
  double tolerance;
  void *states, *stats, *scaled;  // [count - 1][B][Q][D], [count][B][Q][2], [B][Q][D]
  int64_t* moves;                 // [B][Q]; negative, while steps are taken, of a row at rest
};

AttentionArgs arguments(const InputView& query, const InputView& key, const InputView& rows, const InputView& mask,
                        double scale) {
  const DType dtype = query.dtype();
  AttentionArgs a{};
  a.batch = query.size(0), a.heads = a.key_heads = 1, a.queries = query.size(1), a.width = query.size(2);
  a.keys = a.seen_keys = key.size(1), a.value_width = rows.size(2);
  const auto tensor = [&](const char* name, const InputView& t, int64_t length, int64_t width) {
    check_tensor(kOp, name, t, {a.batch, length, width}, dtype);
    check_inner(kOp, name, t);
    return AttentionTensor{t.data(), t.stride(0), 0, t.stride(1)};
  };
  a.query = tensor("query", query, a.queries, a.width);
  a.key = tensor("key", key, a.keys, a.width);
  a.value = tensor("value", rows, a.keys, a.value_width);
  if (mask.defined()) {
    check_tensor(kOp, "mask", mask, {a.batch, a.keys}, DType::boolean);
    check_inner(kOp, "mask", mask);
    a.mask = mask.data(), a.mask_boolean = true, a.mask_b = mask.stride(0), a.mask_k = 1, a.mask_group = 1;
    a.mask_batch = a.batch, a.mask_heads = a.mask_queries = 1, a.mask_keys = a.keys;
  }
  a.scale = scale, a.left = a.right = -1;
  set_splits(a);
  return a;
}

// The state of rows [first, last) of [B][Q] that step `s` starts from, times beta where there is one.
template <class A>
AttentionTensor state_of(const Steps& run, int64_t s, int64_t first, int64_t last) {
  const AttentionArgs& a = run.update;
  const int64_t width = a.width, all = a.batch * a.queries * width;
  const A* states = static_cast<const A*>(run.states) + (s - 1) * all;
  if (!run.beta.data) return s ? AttentionTensor{states, a.queries * width, 0, width} : a.query;
  for (int64_t row = first; row < last; row++) {
    const int64_t b = row / a.queries, q = row % a.queries;
    const A* from = s ? states + row * width : static_cast<const A*>(a.query.data) + b * a.query.b + q * a.query.row;
    const A beta = static_cast<const A*>(run.beta.data)[b * run.beta.b + q * run.beta.row];
    A* to = static_cast<A*>(run.scaled) + row * width;
    for (int64_t j = 0; j < width; j++) to[j] = beta * from[j];
  }
  return {run.scaled, a.queries * width, 0, width};
}

// Step s has written xi[s + 1] of rows [first, last): rows at rest get back xi[s], the others are counted and looked
// at. Returns whether one still moves.
template <class A>
bool settle(const Steps& run, int64_t s, int64_t first, int64_t last) {
  const AttentionArgs& a = run.update;
  const int64_t width = a.width, all = a.batch * a.queries * width;
  bool moving = false;
  for (int64_t row = first; row < last; row++) {
    A* state = static_cast<A*>(run.states) + s * all + row * width;
    const A* before =
        s ? state - all
          : static_cast<const A*>(a.query.data) + row / a.queries * a.query.b + row % a.queries * a.query.row;
    if (run.moves[row] < 0) {
      std::memcpy(state, before, size_t(width) * sizeof(A));
      continue;
    }
    double distance = 0;
    for (int64_t j = 0; run.tolerance > 0 && j < width; j++)
      distance += (double(state[j]) - double(before[j])) * (double(state[j]) - double(before[j]));
    const bool rests = run.tolerance > 0 && !(distance >= run.tolerance * run.tolerance);
    run.moves[row] = rests ? -(s + 1) : s + 1;
    moving = moving || !rests;
  }
  return moving;
}

// All steps of rows [first, last) of [B][Q]; compute(arguments) runs one of them. Steps that no row takes are left out:
// their states are copies, their statistics those of a softmax over nothing, which gives no gradient.
template <class A, class Compute>
void iterate(const Steps& run, int64_t first, int64_t last, const Compute& compute) {
  const int64_t rows = run.update.batch * run.update.queries, width = run.update.width;
  A* stats = static_cast<A*>(run.stats);
  bool moving = true;
  for (int64_t row = first; row < last; row++) run.moves[row] = 0;
  for (int64_t s = 0; s + 1 < run.count; s++) {
    A* states = static_cast<A*>(run.states) + (s * rows + first) * width;
    if (!moving) {
      std::memcpy(states, states - rows * width, size_t((last - first) * width) * sizeof(A));
      for (int64_t row = first; row < last; row++) {
        A* own = stats + (s * rows + row) * 2;
        own[0] = A(-INFINITY), own[1] = 0;
      }
      continue;
    }
    AttentionArgs step = run.update;
    step.query = state_of<A>(run, s, first, last);
    step.out_data = static_cast<A*>(run.states) + s * rows * width, step.stats_data = stats + s * rows * 2;
    compute(step);
    moving = settle<A>(run, s, first, last);
  }
  AttentionArgs read = run.read;
  read.query = state_of<A>(run, run.count - 1, first, last), read.stats_data = stats + (run.count - 1) * rows * 2;
  compute(read);
  for (int64_t row = first; row < last; row++) run.moves[row] = std::abs(run.moves[row]);
}

template <class A>
void run_steps(const Steps& run, int type) {
  const auto& kernels = select(attention_levels);
  const AttentionArgs& a = run.read;
  const int64_t bytes = std::max(kernels.forward_scratch[type](a), kernels.forward_scratch[type](run.update));
  if (a.splits == 1) {
    const int64_t groups = blocks_of(a.queries, kQueries);
    run_tasks(a.batch * groups, double(run.count) * work(a), bytes, [&](int64_t task, void* scratch) {
      const int64_t b = task / groups, begin = task % groups * kQueries, end = std::min(begin + kQueries, a.queries);
      iterate<A>(run, b * a.queries + begin, b * a.queries + end,
                 [&](const AttentionArgs& step) { kernels.forward[type](step, b, 0, begin, end, 0, scratch); });
    });
    return;
  }
  // Few queries over many patterns: the patterns of a step are shared out.
  iterate<A>(run, 0, a.batch * a.queries, [&](AttentionArgs step) {
    Scratch partials;
    step.partial =
        partials.take<char>(a.batch * a.splits * a.queries * (padded16(step.value_width) + 2) * int64_t(sizeof(A)));
    run_tasks(a.batch * a.splits, work(step), bytes, [&](int64_t task, void* scratch) {
      kernels.forward[type](step, task / a.splits, 0, 0, a.queries, task % a.splits, scratch);
    });
    run_tasks(a.batch, double(a.batch * a.splits * a.queries * step.value_width), 0,
              [&](int64_t b, void*) { kernels.merge[type](step, b, 0); });
  });
}

void forward(const TensorView& read, const TensorView& states, const TensorView& stats, const TensorView& moves,
             const InputView& query, const InputView& key, const InputView& beta, const InputView& value,
             const InputView& mask, double scale, int64_t steps, double tolerance) {
  check_rank(kOp, "query", query, 3), check_rank(kOp, "key", key, 3);
  const InputView& rows = value.defined() ? value : key;
  check_rank(kOp, "value", rows, 3);
  const DType dtype = query.dtype();
  MK_CHECK(dtype == DType::float64 || dtype == DType::float32, kOp, "query", "float64 or float32", describe(query));
  Steps run{};
  run.update = arguments(query, key, key, mask, scale), run.read = arguments(query, key, rows, mask, scale);
  run.count = steps, run.tolerance = tolerance;
  const int64_t batch = run.read.batch, queries = run.read.queries, width = run.read.width;
  if (beta.defined()) {
    check_tensor(kOp, "beta", beta, {batch, queries}, dtype);
    run.beta = {beta.data(), beta.stride(0), 0, beta.stride(1)};
  }
  check_output(kOp, "read", read, {batch, queries, run.read.value_width}, dtype);
  check_output(kOp, "states", states, {steps - 1, batch, queries, width}, dtype);
  check_output(kOp, "stats", stats, {steps, batch, queries, 2}, dtype);
  check_output(kOp, "moves", moves, {batch, queries}, DType::int64);
  run.read.out_data = read.data(), run.states = states.data(), run.stats = stats.data();
  run.moves = moves.data<int64_t>();
  pybind11::gil_scoped_release nogil;
  Scratch scratch;
  const int64_t size = item_size(dtype);
  run.update.lse_data = run.read.lse_data = scratch.take<char>(batch * queries * size);
  if (run.beta.data) run.scaled = scratch.take<char>(batch * queries * width * size);
  if (dtype == DType::float64)
    run_steps<double>(run, int(dtype));
  else
    run_steps<float>(run, int(dtype));
}

// The backward of one read of `rows`: attention's, of a single head.
void step_backward(const TensorView& dquery, const TensorView& dkey, const TensorView& drows, const InputView& dread,
                   const InputView& query, const InputView& key, const InputView& rows, const InputView& mask,
                   const InputView& read, const TensorView& stats, double scale) {
  check_rank(kOp, "query", query, 3), check_rank(kOp, "key", key, 3), check_rank(kOp, "value", rows, 3);
  check_float(kOp, "query", query);
  AttentionArgs a = arguments(query, key, rows, mask, scale);
  const DType dtype = query.dtype();
  const auto upstream = [&](const char* name, const InputView& t) {
    check_tensor(kOp, name, t, {a.batch, a.queries, a.value_width}, dtype), check_inner(kOp, name, t);
    return AttentionTensor{t.data(), t.stride(0), 0, t.stride(1)};
  };
  a.dout = upstream("dread", dread), a.out = upstream("read", read);
  check_output(kOp, "stats", stats, {a.batch, a.queries, 2}, wide(dtype));
  a.stats = stats.data();
  a.dquery = written(kOp, "dquery", dquery, {a.batch, a.queries, a.width}, dtype);
  a.dkey = written(kOp, "dkey", dkey, {a.batch, a.keys, a.width}, dtype);
  a.dvalue = written(kOp, "dvalue", drows, {a.batch, a.keys, a.value_width}, dtype);
  const auto& kernels = select(attention_levels);
  pybind11::gil_scoped_release nogil;
  if (a.batch == 0) return;
  const int type = int(dtype);
  const int64_t count = a.batch * a.queries, size = sum_size(dtype);
  Scratch scratch;
  a.rows_base = scratch.take<char>(count * size), a.rows_unit = scratch.take<char>(count * size);
  a.rows_delta = scratch.take<char>(count * size);
  if (a.dquery) a.dquery_sums = scratch.take<char>(a.splits * count * padded16(a.width) * size);
  parallel_for(count, grain_for(2 * a.value_width * size),
               [&](int64_t begin, int64_t end) { kernels.prepare[type](a, begin, end); });
  restate(a, kernels, type);
  keys_and_queries(a, kernels, type);
  if (a.dquery)
    parallel_for(count, grain_for(2 * a.width * size),
                 [&](int64_t begin, int64_t end) { kernels.finish[type](a, begin, end, a.splits); });
}

}  // namespace

void bind_hopfield_retrieve(pybind11::module_& m) {
  m.def("hopfield_retrieve", &forward);
  m.def("hopfield_step_backward", &step_backward);
}

}  // namespace mk::cpu
