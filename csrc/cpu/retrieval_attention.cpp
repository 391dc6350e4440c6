// retrieval_attention, host side: checks, the split into tasks, the Python binding. The local context goes through the
// kernels of attention; what they leave of a row is joined with the memories that it retrieved.
#include "cpu/retrieval_attention.h"

#include <atomic>
#include <cstring>
#include <stdexcept>

#include "common/pages.h"
#include "cpu/attention_host.h"
#include "cpu/select.h"

namespace mk::cpu {
namespace {

constexpr const char* kOp = "retrieval_attention";
// Queries of a task. A multiple of the rows that attention works on at a time, so that it changes no bit.
constexpr int64_t kQueries = 192, kRetrievingQueries = 32;
constexpr int64_t kMostRows = 1 << 16;  // memory rows whose inverse index one task makes
constexpr int64_t kMostRetrieved = int64_t(256)
                                   << 10;  // bytes of weights and ds kept at a time, unless the threads need more

struct Inputs {
  const InputView &query, &key, &value, &memory_key, &memory_value, &index, &bias;
};
struct Options {
  double scale;
  int64_t left, right;
};

AttentionArgs local_arguments(const Inputs& in, const Options& options) {
  check_rank(kOp, "query", in.query, 4), check_rank(kOp, "key", in.key, 4), check_rank(kOp, "value", in.value, 4);
  check_float(kOp, "query", in.query);
  const DType dtype = in.query.dtype();
  AttentionArgs a{};
  a.batch = in.query.size(0), a.heads = in.query.size(1), a.queries = in.query.size(2), a.width = in.query.size(3);
  a.key_heads = in.key.size(1), a.keys = in.key.size(2), a.value_width = in.value.size(3);
  a.query = checked(kOp, "query", in.query, {a.batch, a.heads, a.queries, a.width}, dtype);
  a.key = checked(kOp, "key", in.key, {a.batch, a.key_heads, a.keys, a.width}, dtype);
  a.value = checked(kOp, "value", in.value, {a.batch, a.key_heads, a.keys, a.value_width}, dtype);
  if (a.key_heads ? a.heads % a.key_heads : a.heads)
    fail(kOp, "key", "a head count that divides the query's", describe(in.key));
  a.scale = options.scale, a.left = options.left, a.right = options.right;
  a.seen_keys = a.keys;
  a.splits = 1, a.split_keys = std::max<int64_t>(a.keys, 1);
  a.joint = true;
  return a;
}

RetrievalArgs arguments(const Inputs& in, const AttentionArgs& a) {
  check_rank(kOp, "memory_key", in.memory_key, 4), check_rank(kOp, "index", in.index, 4);
  const DType dtype = in.query.dtype();
  RetrievalArgs r{};
  r.query = a.query, r.batch = a.batch, r.heads = a.heads, r.key_heads = a.key_heads, r.queries = a.queries;
  r.width = a.width, r.value_width = a.value_width, r.scale = a.scale;
  r.rows = in.memory_key.size(2), r.slots = in.index.size(3);
  r.memory_key = checked(kOp, "memory_key", in.memory_key, {r.batch, r.key_heads, r.rows, r.width}, dtype);
  r.memory_value = checked(kOp, "memory_value", in.memory_value, {r.batch, r.key_heads, r.rows, r.value_width}, dtype);
  r.index = checked(kOp, "index", in.index, {r.batch, r.heads, r.queries, r.slots}, DType::int64);
  r.bias = checked(kOp, "memory_bias", in.bias, {r.batch, r.heads, r.queries, r.slots}, dtype);
  return r;
}

void check_index(const RetrievalArgs& r) {
  std::atomic<bool> found{false};
  int64_t wrong = 0;
  parallel_for(r.batch * r.heads * r.queries, grain_for(8 * r.slots), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const int64_t query = row % r.queries, h = row / r.queries % r.heads, b = row / r.queries / r.heads;
      const int64_t* index =
          static_cast<const int64_t*>(r.index.data) + b * r.index.b + h * r.index.h + query * r.index.row;
      for (int64_t i = 0; i < r.slots; i++)
        if ((index[i] < -1 || index[i] >= r.rows) && !found.exchange(true)) wrong = index[i];
    }
  });
  if (!found) return;
  std::ostringstream text;
  text << kOp << ": index: expected -1 or rows 0 to N-1=" << r.rows - 1 << ", got " << wrong;
  throw std::out_of_range(text.str());  // IndexError in Python
}

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

double retrieved_work(const RetrievalArgs& r) {
  return 2.0 * double(r.batch * r.heads * r.queries) * double(r.slots) * double(r.width + r.value_width + 16);
}

// One head of the local context as attention of its own, whose result stays in parts: the second split is the memories.
AttentionArgs local_head(const AttentionArgs& a, int64_t b, int64_t h, int64_t item, void* partial) {
  AttentionArgs local = a;
  const int64_t shared = h / (a.heads / a.key_heads);
  const auto head = [&](AttentionTensor t, int64_t which) {
    return AttentionTensor{static_cast<const char*>(t.data) + (b * t.b + which * t.h) * item, 0, 0, t.row};
  };
  local.query = head(a.query, h), local.key = head(a.key, shared), local.value = head(a.value, shared);
  local.batch = local.heads = local.key_heads = 1;
  local.splits = 2, local.partial = partial;
  return local;
}

void forward(const TensorView& out, const TensorView& lse, const TensorView& stats, const InputView& query,
             const InputView& key, const InputView& value, const InputView& memory_key, const InputView& memory_value,
             const InputView& index, const InputView& bias, double scale, int64_t left, int64_t right) {
  const Inputs in{query, key, value, memory_key, memory_value, index, bias};
  const AttentionArgs a = local_arguments(in, {scale, left, right});
  RetrievalArgs r = arguments(in, a);
  const DType dtype = query.dtype();
  check_output(kOp, "out", out, {a.batch, a.heads, a.queries, a.value_width}, dtype);
  check_output(kOp, "lse", lse, {a.batch, a.heads, a.queries}, wide(dtype));
  check_output(kOp, "stats", stats, {a.batch, a.heads, a.queries, 2}, wide(dtype));
  r.out = out.data(), r.lse = lse.data(), r.stats = stats.data();
  const auto& attention = select(attention_levels);
  const auto& kernels = select(retrieval_attention_levels);
  const int type = int(dtype);
  pybind11::gil_scoped_release nogil;
  check_index(r);
  const int64_t scratch = aligned(attention.forward_scratch[type](a)),
                partial = aligned(a.queries * (padded16(a.value_width) + 2) * sum_size(dtype));
  const int64_t rows = a.batch * a.heads, groups = blocks_of(a.queries, kQueries);
  const int64_t bytes = scratch + partial + kernels.scratch[type](r);
  run_tasks(rows * groups, work(a) + retrieved_work(r), bytes, [&](int64_t task, void* memory) {
    const int64_t row = task % rows, b = row / a.heads, h = row % a.heads, group = groups - 1 - task / rows;
    const int64_t begin = group * kQueries, end = std::min(begin + kQueries, a.queries);
    RetrievalArgs mine = r;
    mine.local = static_cast<char*>(memory) + scratch;
    attention.forward[type](local_head(a, b, h, item_size(dtype), mine.local), 0, 0, begin, end, 0, memory);
    kernels.forward[type](mine, b, h, begin, end, static_cast<char*>(mine.local) + partial);
  });
}

// Runs body(b, h, first query, end, scratch) for the queries of heads [first, last) of [B][NH].
template <class Body>
void for_queries(const RetrievalArgs& r, int64_t bytes, int64_t first, int64_t last, const Body& body) {
  const int64_t groups = blocks_of(r.queries, kRetrievingQueries);
  run_tasks((last - first) * groups, 2 * retrieved_work(r), bytes, [&](int64_t task, void* memory) {
    const int64_t row = first + task / groups, begin = task % groups * kRetrievingQueries;
    body(row / r.heads, row % r.heads, begin, std::min(begin + kRetrievingQueries, r.queries), memory);
  });
}

// No more key heads at a time than keep the threads busy, so that weights and ds of few retrievals exist at once: first
// those, then what they give to the memory.
void retrieved_gradients(RetrievalArgs r, const AttentionArgs& a, const RetrievalKernels& kernels, int type) {
  const bool memory = r.dmemory_key || r.dmemory_value;
  if (!memory && !a.dquery && !a.dkey && !r.dbias) return;
  const int64_t memory_rows = r.batch * r.key_heads * r.rows, item = item_size(DType(type));
  r.key_cleared = r.dmemory_key && clear_pages(r.dmemory_key, memory_rows * r.width * item);
  r.value_cleared = r.dmemory_value && clear_pages(r.dmemory_value, memory_rows * r.value_width * item);
  const int64_t bytes = kernels.scratch[type](r), size = sum_size(DType(type)), group = r.heads / r.key_heads;
  const int64_t each = 2 * group * r.queries * r.slots * size, heads = r.batch * r.key_heads;
  const int64_t tasks = std::max<int64_t>(1, group * blocks_of(r.queries, kRetrievingQueries));
  const int64_t least = std::max(blocks_of(2 * num_threads(), tasks), kMostRetrieved / std::max<int64_t>(each, 1));
  const int64_t at_once = memory ? std::min(heads, least) : heads;
  const int64_t wanted = blocks_of(2 * num_threads(), at_once);
  const int64_t step = std::min(kMostRows, std::max<int64_t>(1024, blocks_of(r.rows, wanted)));
  const int64_t parts = blocks_of(r.rows, step);
  Scratch scratch;
  if (memory) r.retrieved = scratch.take<char>(at_once * each);
  for (int64_t first = 0; first < heads; first += at_once) {
    const int64_t last = std::min(first + at_once, heads);
    r.first_head = first * group;
    for_queries(r, bytes, first * group, last * group, [&](int64_t b, int64_t h, int64_t begin, int64_t end, void* m) {
      kernels.gradient[type](r, a, b, h, begin, end, m);
    });
    if (!memory) continue;
    const double moved = double(last - first) * double(r.rows * (r.width + r.value_width));
    run_tasks_apart((last - first) * parts, moved, kernels.memory_scratch(r, step), [&](int64_t task, void* m) {
      const int64_t row = first + task / parts, from = task % parts * step;
      kernels.memory[type](r, row / r.key_heads, row % r.key_heads, from, std::min(from + step, r.rows), m);
    });
  }
}

// No heads of queries: what the keys and the memory get is nothing.
void clear(const TensorView& t) {
  if (t.defined() && t.numel()) std::memset(t.data(), 0, size_t(t.numel() * item_size(t.dtype())));
}

void backward(const TensorView& dquery, const TensorView& dkey, const TensorView& dvalue, const TensorView& dmemory_key,
              const TensorView& dmemory_value, const TensorView& dbias, const InputView& dout, const TensorView& dlse,
              const InputView& query, const InputView& key, const InputView& value, const InputView& memory_key,
              const InputView& memory_value, const InputView& index, const InputView& bias, const InputView& out,
              const TensorView& stats, double scale, int64_t left, int64_t right) {
  const Inputs in{query, key, value, memory_key, memory_value, index, bias};
  AttentionArgs a = local_arguments(in, {scale, left, right});
  RetrievalArgs r = arguments(in, a);
  const DType dtype = query.dtype();
  r.dout = a.dout = checked(kOp, "dout", dout, {a.batch, a.heads, a.queries, a.value_width}, dtype);
  r.dlse = a.dlse = checked(kOp, "dlse", dlse, {a.batch, a.heads, a.queries}, wide(dtype));
  a.out = checked(kOp, "out", out, {a.batch, a.heads, a.queries, a.value_width}, dtype);
  check_output(kOp, "stats", stats, {a.batch, a.heads, a.queries, 2}, wide(dtype));
  a.stats = stats.data();
  a.dquery = written(kOp, "dquery", dquery, {a.batch, a.heads, a.queries, a.width}, dtype);
  a.dkey = written(kOp, "dkey", dkey, {a.batch, a.key_heads, a.keys, a.width}, dtype);
  a.dvalue = written(kOp, "dvalue", dvalue, {a.batch, a.key_heads, a.keys, a.value_width}, dtype);
  r.dmemory_key = written(kOp, "dmemory_key", dmemory_key, {a.batch, a.key_heads, r.rows, a.width}, dtype);
  r.dmemory_value = written(kOp, "dmemory_value", dmemory_value, {a.batch, a.key_heads, r.rows, a.value_width}, dtype);
  r.dbias = written(kOp, "dmemory_bias", dbias, {a.batch, a.heads, a.queries, r.slots}, dtype);
  const auto& attention = select(attention_levels);
  const auto& kernels = select(retrieval_attention_levels);
  const int type = int(dtype);
  pybind11::gil_scoped_release nogil;
  if (a.batch * a.heads == 0) {
    for (const auto* t : {&dkey, &dvalue, &dmemory_key, &dmemory_value}) clear(*t);
    return;
  }
  check_index(r);
  const int64_t rows = a.batch * a.heads * a.queries, size = sum_size(dtype);
  Scratch scratch;
  a.rows_base = scratch.take<char>(rows * size), a.rows_unit = scratch.take<char>(rows * size);
  a.rows_delta = scratch.take<char>(rows * size);
  const int64_t runs = dtype == wide(dtype) ? 1 : 2;  // local keys; dquery cannot hold the sums of the memories
  if (a.dquery) a.dquery_sums = scratch.take<char>(runs * rows * padded16(a.width) * size);
  parallel_for(rows, grain_for(2 * a.value_width * size),
               [&](int64_t begin, int64_t end) { attention.prepare[type](a, begin, end); });
  restate(a, attention, type);
  if (!std::isinf(a.restate_beyond))
    for_queries(r, kernels.scratch[type](r), 0, a.batch * a.heads,
                [&](int64_t b, int64_t h, int64_t begin, int64_t end, void* memory) {
                  kernels.rejoin[type](r, a, b, h, begin, end, memory);
                });
  if (a.dout.data) {
    a.rows_moved = scratch.take<char>(2 * rows * size);
    over_queries(a, attention, type, attention.center[type]);
  }
  retrieved_gradients(r, a, kernels, type);
  keys_and_queries(a, attention, type);
  if (a.dquery)
    parallel_for(rows, grain_for(2 * a.width * size),
                 [&](int64_t begin, int64_t end) { kernels.finish[type](r, a, begin, end); });
}

}  // namespace

void bind_retrieval_attention(pybind11::module_& m) {
  m.def("retrieval_attention", &forward);
  m.def("retrieval_attention_backward", &backward);
}

}  // namespace mk::cpu
