// attention, host side: checks, the split into tasks, the Python binding.
#include <cstring>

#include "cpu/attention_host.h"
#include "cpu/select.h"

namespace mk::cpu {
namespace {

constexpr const char* kOp = "attention";

struct Options {
  double scale, softcap, dropout;
  int64_t left, right;
  bool bottom_right;
};

void set_mask(AttentionArgs& a, const TensorView& mask, DType dtype) {
  if (!mask.defined()) return;
  check_rank(kOp, "attn_mask", mask, 4);
  check_inner(kOp, "attn_mask", mask);
  a.mask_batch = mask.size(0), a.mask_heads = mask.size(1), a.mask_queries = mask.size(2), a.mask_keys = mask.size(3);
  const auto fits = [](int64_t size, int64_t full) { return size == 1 || size == full; };
  if ((mask.dtype() != dtype && mask.dtype() != DType::boolean) || !fits(a.mask_heads, a.heads) ||
      !fits(a.mask_queries, a.queries) || !fits(a.mask_keys, a.keys) ||
      (a.mask_batch ? a.batch % a.mask_batch : a.batch) != 0)
    fail(kOp, "attn_mask", std::string("bool or ") + dtype_name(dtype) + " that broadcasts to the scores",
         describe(mask));
  a.mask = mask.data(), a.mask_boolean = mask.dtype() == DType::boolean;
  a.mask_b = mask.stride(0), a.mask_h = mask.stride(1), a.mask_q = mask.stride(2), a.mask_k = a.mask_keys == 1 ? 0 : 1;
  a.mask_group = a.mask_batch ? std::max<int64_t>(1, a.batch / a.mask_batch) : 1;
}

void set_sink(AttentionArgs& a, const TensorView& sink, DType dtype) {
  if (!sink.defined()) return;
  check_tensor(kOp, "sink", sink, {a.heads}, dtype);
  a.sink = sink.data(), a.sink_h = sink.stride(0);
}

void set_lengths(AttentionArgs& a, const TensorView& lengths) {
  a.seen_keys = a.keys;
  if (!lengths.defined()) return;
  check_tensor(kOp, "lengths_k", lengths, {a.batch}, DType::int64);
  a.lengths = lengths.data<const int64_t>(), a.lengths_b = lengths.stride(0);
  for (int64_t b = 0; b < a.batch; b++) {
    const int64_t length = a.lengths[b * a.lengths_b];
    MK_CHECK(length >= 0 && length <= a.keys, kOp, "lengths_k", "values in 0..K=" + std::to_string(a.keys), length);
  }
}

AttentionArgs arguments(const TensorView& query, const TensorView& key, const TensorView& value, const TensorView& mask,
                        const TensorView& sink, const TensorView& lengths, const TensorView& seed,
                        const Options& options) {
  check_rank(kOp, "query", query, 4), check_rank(kOp, "key", key, 4), check_rank(kOp, "value", value, 4);
  check_float(kOp, "query", query);
  const DType dtype = query.dtype();
  AttentionArgs a{};
  a.batch = query.size(0), a.heads = query.size(1), a.queries = query.size(2), a.width = query.size(3);
  a.key_heads = key.size(1), a.keys = key.size(2), a.value_width = value.size(3);
  a.query = checked(kOp, "query", query, {a.batch, a.heads, a.queries, a.width}, dtype);
  a.key = checked(kOp, "key", key, {a.batch, a.key_heads, a.keys, a.width}, dtype);
  a.value = checked(kOp, "value", value, {a.batch, a.key_heads, a.keys, a.value_width}, dtype);
  if (a.key_heads ? a.heads % a.key_heads : a.heads)
    fail(kOp, "key", "a head count that divides the query's", describe(key));
  set_mask(a, mask, dtype);
  set_sink(a, sink, dtype);
  set_lengths(a, lengths);
  if (seed.defined() && options.dropout > 0) {
    check_tensor(kOp, "seed", seed, {a.batch}, DType::int64);
    a.seed = seed.data<const int64_t>(), a.seed_b = seed.stride(0);
    a.drop_all = options.dropout >= 1;
    a.threshold = a.drop_all ? 0 : uint32_t(options.dropout * 4294967296.0);
    a.keep_scale = a.drop_all ? 0 : 1 / (1 - options.dropout);
  }
  a.scale = options.scale, a.softcap = options.softcap, a.left = options.left, a.right = options.right;
  a.bottom_right = options.bottom_right, a.shift = a.bottom_right ? a.keys - a.queries : 0;
  set_splits(a);
  return a;
}

// Large groups pack the keys less often; sequences that would be one or two of them keep more tasks for threads.
int64_t queries_a_task(const AttentionArgs& a, int64_t group) {
  constexpr int64_t kSmallGroup = 512;
  return a.queries >= 2 * group ? group : std::min(group, kSmallGroup);
}

void forward(const TensorView& out, const TensorView& lse, const TensorView& stats, const InputView& query,
             const InputView& key, const InputView& value, const InputView& mask, const TensorView& sink,
             const TensorView& lengths, const TensorView& seed, double scale, double softcap, double dropout,
             int64_t left, int64_t right, bool bottom_right) {
  AttentionArgs a =
      arguments(query, key, value, mask, sink, lengths, seed, {scale, softcap, dropout, left, right, bottom_right});
  const DType dtype = query.dtype();
  check_output(kOp, "out", out, {a.batch, a.heads, a.queries, a.value_width}, dtype);
  check_output(kOp, "lse", lse, {a.batch, a.heads, a.queries}, wide(dtype));
  check_output(kOp, "stats", stats, {a.batch, a.heads, a.queries, 2}, wide(dtype));
  a.out_data = out.data(), a.lse_data = lse.data(), a.stats_data = stats.data();
  const auto& kernels = select(attention_levels);
  const int type = int(dtype);
  pybind11::gil_scoped_release nogil;
  const int64_t rows = a.batch * a.heads, step = queries_a_task(a, kernels.query_group[type]);
  const int64_t groups = blocks_of(a.queries, step);
  Scratch partials;
  if (a.splits > 1)
    a.partial = partials.take<char>(rows * a.splits * a.queries * (padded16(a.value_width) + 2) * sum_size(dtype));
  run_tasks(rows * groups * a.splits, work(a), kernels.forward_scratch[type](a), [&](int64_t task, void* scratch) {
    const int64_t split = task % a.splits, row = task / a.splits % rows, group = groups - 1 - task / a.splits / rows;
    const int64_t begin = group * step, end = std::min(begin + step, a.queries), b = row / a.heads;
    AttentionArgs room;
    kernels.forward[type](entry_of(a, b, room), b, row % a.heads, begin, end, split, scratch);
  });
  if (a.splits == 1) return;
  run_tasks(rows, double(rows * a.splits * a.queries * a.value_width), 0,
            [&](int64_t row, void*) { kernels.merge[type](a, row / a.heads, row % a.heads); });
}

// An additive mask, shared, with an element for every query and key. Not of the half types, whose gradient would be
// rounded at every addend; nor of one key, whose gradient is that of the log-sum-exp alone (mask_of_rows).
bool is_shared_block(const AttentionArgs& a, int type) {
  return a.mask && !a.mask_boolean && !mask_is_full(a) && a.mask_queries == a.queries && a.mask_keys == a.keys &&
         a.keys > 1 && (a.mask_heads == a.heads || a.mask_heads == 1) && type < int(DType::bfloat16);
}

// Heads that share a mask are one task: its keys are split, for threads to have several. By the shapes alone, as the
// splits decide the bits of dquery.
void split_shared_heads(AttentionArgs& a, int type) {
  constexpr int64_t kMostRuns = 4, kLeastKeys = 512;
  if (!is_shared_block(a, type) || a.mask_heads == a.heads || a.splits > 1) return;
  const int64_t keys = std::max(kLeastKeys, blocks_of(a.keys, kMostRuns));
  a.split_keys = blocks_of(keys, kLeastKeys) * kLeastKeys,
  a.splits = std::max<int64_t>(1, blocks_of(a.keys, a.split_keys));
}

// Key heads of one task of by_mask_row(): those that share a row of the mask.
int64_t heads_a_row(const AttentionArgs& a) { return a.mask_heads == a.heads ? 1 : a.key_heads; }
int64_t mask_row_tasks(const AttentionArgs& a) { return a.mask_batch * (a.key_heads / heads_a_row(a)) * a.splits; }

// One block of keys of the mask of a task and of its gradient, packed: in place, each row lies in a page of its own,
// and every head would miss the translation of as many addresses as there are queries.
struct MaskBlock {
  int64_t heads, row, head;  // of the mask: how many, its row, the first of them
  int64_t rows, size, keys;  // of the block; bytes of an element
  char *mask, *dmask;

  MaskBlock(const AttentionArgs& a, int64_t row, int64_t head, int64_t size, int64_t keys, char* memory)
      : heads(a.mask_heads == a.heads ? a.heads / a.key_heads : 1),
        row(row),
        head(a.mask_heads == a.heads ? head * heads : 0),
        rows(heads * a.queries),
        size(size),
        keys(keys),
        mask(memory),
        dmask(memory + rows * keys * size) {}
  static int64_t bytes(const AttentionArgs& a, int64_t size, int64_t keys) {
    return 2 * a.heads / a.key_heads * a.queries * keys * size;
  }

  // The arguments for keys [first, first + count) of the packed block.
  AttentionArgs load(const AttentionArgs& a, int64_t first, int64_t count) const {
    const char* from = static_cast<const char*>(a.mask) + (row * a.mask_b + head * a.mask_h + first * a.mask_k) * size;
    for (int64_t i = 0; i < rows; i++)
      std::memcpy(mask + i * keys * size, from + (i / a.queries * a.mask_h + i % a.queries * a.mask_q) * size,
                  size_t(count * size));
    std::memset(dmask, 0, size_t(rows * keys * size));
    AttentionArgs part = a;
    const int64_t before = head * a.queries * keys + first;  // kernels count from head 0 and key 0
    part.mask = before_block(mask, before);
    part.mask_b = 0, part.mask_h = a.mask_heads == 1 ? 0 : a.queries * keys, part.mask_q = keys;
    part.dmask = before_block(dmask, row * a.mask_heads * a.queries * keys + before), part.dmask_row = keys;
    return part;
  }
  void* before_block(char* block, int64_t elements) const {
    return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(block) - uintptr_t(elements * size));
  }
  void store(const AttentionArgs& a, int64_t first, int64_t count) const {
    char* to = static_cast<char*>(a.dmask) + ((row * a.mask_heads + head) * a.queries * a.keys + first) * size;
    for (int64_t i = 0; i < rows; i++)
      std::memcpy(to + i * a.keys * size, dmask + i * keys * size, size_t(count * size));
  }
};

// One task takes all that share a block of the mask and adds to dmask as it goes, in their order.
void by_mask_row(const AttentionArgs& a, const AttentionKernels& kernels, int type) {
  const int64_t bytes = kernels.backward_scratch[type](a), heads = heads_a_row(a), columns = a.key_heads / heads;
  const int64_t size = sum_size(DType(type)), step = kernels.key_block;
  run_tasks(mask_row_tasks(a), 2.5 * work(a), bytes + MaskBlock::bytes(a, size, step),
            [&](int64_t task, char* scratch) {
              const int64_t run = task % a.splits, column = task / a.splits % columns, row = task / a.splits / columns;
              const int64_t start = run * a.split_keys, stop = std::min(start + a.split_keys, a.keys);
              const MaskBlock block(a, row, column, size, step, scratch + bytes);
              for (int64_t first = start; first < stop; first += step) {
                const int64_t last = std::min(first + step, stop);
                const AttentionArgs part = block.load(a, first, last - first);
                AttentionArgs room;
                for (int64_t i = 0; i < a.mask_group * heads; i++) {
                  const int64_t b = row * a.mask_group + i / heads, h = column * heads + i % heads;
                  kernels.backward[type](entry_of(part, b, room),
                                         {b, h, first, last, 0, a.queries, run, a.dquery != nullptr, a.dkey || a.dvalue,
                                          false, true, first > start},
                                         scratch);
                }
                block.store(a, first, last - first);
              }
            });
}

void shared_mask(const AttentionArgs& a, const AttentionKernels& kernels, int type) {
  const bool by_key = a.mask_queries == 1 && a.mask_keys != 1, whole = a.mask_queries == 1 && a.mask_keys == 1;
  const int64_t n = by_key ? a.keys : a.queries, step = whole    ? std::max<int64_t>(n, 1)
                                                        : by_key ? kernels.key_block
                                                                 : kernels.query_block;
  const int64_t steps = whole ? 1 : blocks_of(n, step), rows = a.mask_batch * a.mask_heads;
  run_tasks(rows * steps, work(a), kernels.backward_scratch[type](a), [&](int64_t task, void* scratch) {
    const int64_t row = task / steps, first = task % steps * step;
    kernels.mask_backward[type](a, row / a.mask_heads, row % a.mask_heads, first, std::min(first + step, n), scratch);
  });
}

void backward(const TensorView& dquery, const TensorView& dkey, const TensorView& dvalue, const TensorView& dmask,
              const TensorView& dsink, const InputView& dout, const TensorView& dlse, const InputView& query,
              const InputView& key, const InputView& value, const InputView& mask, const TensorView& sink,
              const TensorView& lengths, const TensorView& seed, const InputView& out, const TensorView& stats,
              double scale, double softcap, double dropout, int64_t left, int64_t right, bool bottom_right) {
  AttentionArgs a =
      arguments(query, key, value, mask, sink, lengths, seed, {scale, softcap, dropout, left, right, bottom_right});
  const DType dtype = query.dtype();
  a.dout = checked(kOp, "dout", dout, {a.batch, a.heads, a.queries, a.value_width}, dtype);
  a.out = checked(kOp, "out", out, {a.batch, a.heads, a.queries, a.value_width}, dtype);
  a.dlse = checked(kOp, "dlse", dlse, {a.batch, a.heads, a.queries}, wide(dtype));
  check_output(kOp, "stats", stats, {a.batch, a.heads, a.queries, 2}, wide(dtype));
  a.stats = stats.data();
  a.dquery = written(kOp, "dquery", dquery, {a.batch, a.heads, a.queries, a.width}, dtype);
  a.dkey = written(kOp, "dkey", dkey, {a.batch, a.key_heads, a.keys, a.width}, dtype);
  a.dvalue = written(kOp, "dvalue", dvalue, {a.batch, a.key_heads, a.keys, a.value_width}, dtype);
  a.dmask = written(kOp, "dattn_mask", dmask, {a.mask_batch, a.mask_heads, a.mask_queries, a.mask_keys}, dtype);
  a.dmask_row = a.keys;
  a.dsink = written(kOp, "dsink", dsink, {a.heads}, dtype);
  const auto& kernels = select(attention_levels);
  const int type = int(dtype);
  pybind11::gil_scoped_release nogil;
  if (a.batch * a.heads == 0) {  // no heads of queries, no heads of keys: of the gradients a shared mask's has elements
    if (a.dmask) std::memset(a.dmask, 0, size_t(dmask.numel() * item_size(dtype)));
    if (a.dsink) std::memset(a.dsink, 0, size_t(a.heads * item_size(dtype)));
    return;
  }
  split_shared_heads(a, type);
  const int64_t rows = a.batch * a.heads * a.queries, size = sum_size(dtype);
  Scratch scratch;
  a.rows_base = scratch.take<char>(rows * size), a.rows_unit = scratch.take<char>(rows * size);
  a.rows_delta = scratch.take<char>(rows * size);
  if (a.sink) a.rows_sink = scratch.take<char>(rows * size);
  if (a.dquery) a.dquery_sums = scratch.take<char>(a.splits * rows * padded16(a.width) * size);
  parallel_for(rows, grain_for(2 * a.value_width * size),
               [&](int64_t begin, int64_t end) { kernels.prepare[type](a, begin, end); });
  restate(a, kernels, type);
  if (a.dmask && mask_is_full(a) && (a.left >= 0 || a.right >= 0 || a.lengths))
    std::memset(a.dmask, 0, size_t(dmask.numel() * item_size(dtype)));
  const bool by_row = a.dmask && is_shared_block(a, type) && mask_row_tasks(a) >= num_threads();
  if (by_row)
    by_mask_row(a, kernels, type);
  else
    keys_and_queries(a, kernels, type);
  if (a.dmask && !mask_is_full(a) && !by_row) shared_mask(a, kernels, type);
  if (a.dsink)
    parallel_for(a.heads, grain_for(a.batch * a.queries * size),
                 [&](int64_t begin, int64_t end) { kernels.sink_backward[type](a, begin, end); });
  if (a.dquery)
    parallel_for(rows, grain_for(2 * a.width * size),
                 [&](int64_t begin, int64_t end) { kernels.finish[type](a, begin, end, a.splits); });
}

}  // namespace

void bind_attention(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("attention", &forward, py::arg("out"), py::arg("lse"), py::arg("stats"), py::arg("query"), py::arg("key"),
        py::arg("value"), py::arg("attn_mask"), py::arg("sink"), py::arg("lengths_k"), py::arg("seed"),
        py::arg("scale"), py::arg("softcap"), py::arg("dropout_p"), py::arg("left"), py::arg("right"),
        py::arg("bottom_right"));
  m.def("attention_backward", &backward, py::arg("dquery"), py::arg("dkey"), py::arg("dvalue"), py::arg("dattn_mask"),
        py::arg("dsink"), py::arg("dout"), py::arg("dlse"), py::arg("query"), py::arg("key"), py::arg("value"),
        py::arg("attn_mask"), py::arg("sink"), py::arg("lengths_k"), py::arg("seed"), py::arg("out"), py::arg("stats"),
        py::arg("scale"), py::arg("softcap"), py::arg("dropout_p"), py::arg("left"), py::arg("right"),
        py::arg("bottom_right"));
}

}  // namespace mk::cpu
