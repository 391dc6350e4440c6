// attention of sequences laid end to end, host side: every sequence is a call of the kernels of attention, with the
// same blocks, so it has the bits it has alone; the tasks of all sequences are dealt out together, the longest first.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/checks.h"
#include "common/pages.h"
#include "cpu/attention_host.h"
#include "cpu/select.h"

namespace mk::cpu {
namespace {

constexpr const char* kOp = "attention_varlen";
constexpr int64_t kRows = 256;  // of a task that passes over rows once

struct Sequence {
  int64_t query, queries, key, keys;  // first token and number of tokens
  int64_t splits, sums;               // sums: where its partial results begin, in rows
};

// Tasks of the sequences in their order: count(sequence) tasks each.
class Deal {
 public:
  template <class Count>
  Deal(const std::vector<Sequence>& all, const Count& count) : all_(all) {
    ends_.reserve(all.size());
    for (const Sequence& s : all) ends_.push_back((total += count(s)));
  }
  // The sequence of a task, which becomes the number of the task within it.
  const Sequence& find(int64_t& task) const {
    const size_t i = size_t(std::upper_bound(ends_.begin(), ends_.end(), task) - ends_.begin());
    if (i) task -= ends_[i - 1];
    return all_[i];
  }
  int64_t total = 0;

 private:
  const std::vector<Sequence>& all_;
  std::vector<int64_t> ends_;
};

char* at(const void* data, int64_t elements, int64_t size) {
  return static_cast<char*>(const_cast<void*>(data)) + elements * size;
}

class Call {
 public:
  AttentionArgs base{};  // of all tokens; one entry, all heads
  DType dtype;
  int type;
  int64_t size, sum, group, tokens, key_tokens;
  bool bottom_right;
  std::vector<Sequence> sequences;  // with queries, the longest first
  double flops = 0, scores = 0;     // of all sequences and heads
  const AttentionKernels& kernels = select(attention_levels);

  Call(const TensorView& query, const TensorView& key, const TensorView& value, const TensorView& starts_q,
       const TensorView& starts_k, double scale, int64_t left, int64_t right, bool bottom_right)
      : bottom_right(bottom_right) {
    check_rank(kOp, "query", query, 3), check_rank(kOp, "key", key, 3), check_rank(kOp, "value", value, 3);
    type = check_float(kOp, "query", query), dtype = query.dtype();
    size = item_size(dtype), sum = sum_size(dtype);
    AttentionArgs& a = base;
    tokens = query.size(0), key_tokens = key.size(0);
    a.batch = 1, a.heads = query.size(1), a.key_heads = key.size(1);
    a.width = query.size(2), a.value_width = value.size(2);
    a.scale = scale, a.left = left, a.right = right;
    a.query = input("query", query, tokens, a.heads, a.width);
    a.key = input("key", key, key_tokens, a.key_heads, a.width);
    a.value = input("value", value, key_tokens, a.key_heads, a.value_width);
    if (a.key_heads ? a.heads % a.key_heads : a.heads)
      fail(kOp, "key", "a head count that divides the query's", describe(key));
    group = a.key_heads ? a.heads / a.key_heads : 1;
    cut(starts_q, starts_k);
  }

  AttentionTensor input(const char* name, const TensorView& t, int64_t rows, int64_t heads, int64_t width) const {
    if (!t.defined()) return {};
    check_tensor(kOp, name, t, {rows, heads, width}, dtype);
    check_inner(kOp, name, t);
    return {t.data(), 0, t.stride(1), t.stride(0)};
  }

  // Heads [head, head + heads) of a sequence, which share one key head.
  AttentionArgs of(const Sequence& s, int64_t head, int64_t heads) const {
    AttentionArgs a = base;
    a.heads = heads, a.key_heads = 1, a.queries = s.queries, a.keys = s.keys;
    a.shift = bottom_right ? s.keys - s.queries : 0;
    const auto move = [](AttentionTensor& t, int64_t row, int64_t h, int64_t bytes) {
      if (t.data) t.data = at(t.data, row * t.row + h * t.h, bytes);
    };
    move(a.query, s.query, head, size), move(a.dout, s.query, head, size), move(a.out, s.query, head, size);
    move(a.dlse, s.query, head, sum);
    move(a.key, s.key, head / group, size), move(a.value, s.key, head / group, size);
    set_splits(a);
    return a;
  }
  // Where numbers of (sequence, head) lie in an array of all tokens and heads.
  int64_t place(const Sequence& s, int64_t head) const { return s.query * base.heads + head * s.queries; }

  template <class Scratch>
  int64_t most(const Scratch& scratch, int64_t heads) const {
    int64_t bytes = 0;
    for (const Sequence& s : sequences) bytes = std::max(bytes, scratch(of(s, 0, heads)));
    return (bytes + 63) / 64 * 64;
  }

 private:
  static std::vector<int64_t> starts(const char* name, const TensorView& t, int64_t count, int64_t tokens) {
    check_tensor(kOp, name, t, {count}, DType::int64);
    std::vector<int64_t> found(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; i++) found[size_t(i)] = t.data<const int64_t>()[i * t.stride(0)];
    for (int64_t i = 0; i < count; i++)
      if (found[size_t(i)] < (i ? found[size_t(i) - 1] : 0) || (!i && found[0]) || found[size_t(i)] > tokens)
        fail(kOp, name, "values that do not decrease, from 0 to at most " + std::to_string(tokens), found[size_t(i)]);
    return found;
  }

  void cut(const TensorView& starts_q, const TensorView& starts_k) {
    check_rank(kOp, "cu_seqlens_q", starts_q, 1);
    if (starts_q.size(0) == 0) fail(kOp, "cu_seqlens_q", "at least 1 element", describe(starts_q));
    const auto q = starts("cu_seqlens_q", starts_q, starts_q.size(0), tokens);
    const auto k = starts("cu_seqlens_k", starts_k, starts_q.size(0), key_tokens);
    int64_t rows = 0;
    for (size_t i = 0; i + 1 < q.size(); i++)
      if (q[i + 1] > q[i]) sequences.push_back({q[i], q[i + 1] - q[i], k[i], k[i + 1] - k[i], 1, 0});
    std::stable_sort(sequences.begin(), sequences.end(), [](const Sequence& a, const Sequence& b) {
      return double(a.queries) * double(a.keys) > double(b.queries) * double(b.keys);
    });
    for (Sequence& s : sequences) {
      const AttentionArgs a = of(s, 0, 1);
      s.splits = a.splits, s.sums = rows;
      rows += base.heads * s.queries * s.splits;
      flops += work(a) * double(base.heads);
      scores += double(s.queries) * double(s.keys) * double(base.heads);
    }
    sum_rows = rows;
  }

 public:
  int64_t sum_rows = 0;  // of all sequences, one a split
};

// rows x bytes to rows `step` bytes apart.
void copy_rows(const void* from, int64_t rows, int64_t bytes, void* to, int64_t step) {
  for (int64_t i = 0; i < rows; i++) std::memcpy(at(to, i, step), at(from, i, bytes), size_t(bytes));
}

// What forward writes for queries in no sequence.
void leave_out(const Call& c, void* out, void* lse, void* stats) {
  int64_t end = 0;
  for (const Sequence& s : c.sequences) end = std::max(end, s.query + s.queries);
  const int64_t heads = c.base.heads, rows = (c.tokens - end) * heads;
  if (rows == 0) return;
  std::memset(at(out, end * heads, c.base.value_width * c.size), 0, size_t(rows * c.base.value_width * c.size));
  const auto fill = [&](auto zero) {
    using A = decltype(zero);
    const A none = -std::numeric_limits<A>::infinity();
    std::fill_n(static_cast<A*>(lse) + end * heads, rows, none);
    for (int64_t h = 0; h < heads; h++)
      for (int64_t i = end; i < c.tokens; i++) {
        A* row = static_cast<A*>(stats) + 2 * (h * c.tokens + i);
        row[0] = none, row[1] = 0;
      }
  };
  c.dtype == DType::float64 ? fill(0.0) : fill(0.0f);
}

// The rows that a forward or a merge writes, on their way to the layout of the outputs.
struct Written {
  char *out, *lse;

  Written(AttentionArgs& a, const Call& c, char* memory, int64_t begin, int64_t rows) : out(memory) {
    lse = out + rows * a.value_width * c.size / 16 * 16 + 16;
    a.out_data = at(out, -begin * a.value_width, c.size), a.lse_data = at(lse, -begin, c.sum);
  }
  static int64_t bytes(const Call& c, int64_t rows) { return rows * (c.base.value_width * c.size + c.sum) + 32; }
  void place(const AttentionArgs& a, const Call& c, void* to_out, void* to_lse, int64_t row, int64_t head,
             int64_t rows) const {
    const int64_t heads = c.base.heads, bytes = a.value_width * c.size;
    copy_rows(out, rows, bytes, at(to_out, row * heads + head, bytes), heads * bytes);
    copy_rows(lse, rows, c.sum, at(to_lse, row * heads + head, c.sum), heads * c.sum);
  }
};

void forward(const TensorView& out, const TensorView& lse, const TensorView& stats, const InputView& query,
             const InputView& key, const InputView& value, const TensorView& starts_q, const TensorView& starts_k,
             double scale, int64_t left, int64_t right, bool bottom_right) {
  const Call c(query, key, value, starts_q, starts_k, scale, left, right, bottom_right);
  const int64_t heads = c.base.heads, width = c.base.value_width;
  check_output(kOp, "out", out, {c.tokens, heads, width}, c.dtype);
  check_output(kOp, "lse", lse, {c.tokens, heads}, wide(c.dtype));
  check_output(kOp, "stats", stats, {heads, c.tokens, 2}, wide(c.dtype));
  pybind11::gil_scoped_release nogil;
  leave_out(c, out.data(), lse.data(), stats.data());
  if (heads == 0) return;
  const int64_t step = c.kernels.query_group[c.type], partial_row = (padded16(width) + 2) * c.sum;
  bool splits = false;
  for (const Sequence& s : c.sequences) splits = splits || s.splits > 1;
  Scratch partials;
  char* partial = splits ? partials.take<char>(c.sum_rows * partial_row) : nullptr;
  const auto prepared = [&](const Sequence& s, int64_t head) {
    AttentionArgs a = c.of(s, head, 1);
    a.stats_data = at(stats.data(), 2 * (head * c.tokens + s.query), c.sum);
    if (s.splits > 1) a.partial = at(partial, s.sums + head * s.queries * s.splits, partial_row);
    return a;
  };
  const int64_t kernel_bytes = c.most(c.kernels.forward_scratch[c.type], 1);
  const Deal tasks(c.sequences, [&](const Sequence& s) { return heads * blocks_of(s.queries, step) * s.splits; });
  run_tasks(tasks.total, c.flops, kernel_bytes + Written::bytes(c, step), [&](int64_t task, char* memory) {
    const Sequence& s = tasks.find(task);
    const int64_t groups = blocks_of(s.queries, step), split = task % s.splits, head = task / s.splits % heads;
    const int64_t begin = (groups - 1 - task / s.splits / heads) * step, end = std::min(begin + step, s.queries);
    AttentionArgs a = prepared(s, head);
    const Written rows(a, c, memory + kernel_bytes, begin, end - begin);
    c.kernels.forward[c.type](a, 0, 0, begin, end, split, memory);
    if (s.splits == 1) rows.place(a, c, out.data(), lse.data(), s.query + begin, head, end - begin);
  });
  if (!splits) return;
  const Deal merges(c.sequences, [&](const Sequence& s) { return s.splits > 1 ? heads : 0; });
  run_tasks(merges.total, double(c.sum_rows * width), Written::bytes(c, kFewQueries), [&](int64_t head, char* memory) {
    const Sequence& s = merges.find(head);
    AttentionArgs a = prepared(s, head);
    const Written rows(a, c, memory, 0, s.queries);
    c.kernels.merge[c.type](a, 0, 0);
    rows.place(a, c, out.data(), lse.data(), s.query, head, s.queries);
  });
}

struct Gradients {
  void *query, *key, *value;
  const void* stats;
  char *base, *unit, *delta, *sums;
  int64_t sum_row;  // bytes

  // Of the heads that share a key head, from `head` on.
  AttentionArgs of(const Call& c, const Sequence& s, int64_t head, int64_t heads) const {
    AttentionArgs a = c.of(s, head, heads);
    a.restate_beyond = c.kernels.restate_beyond[c.type](a);
    const int64_t place = c.place(s, head);
    a.rows_base = at(base, place, c.sum), a.rows_unit = at(unit, place, c.sum), a.rows_delta = at(delta, place, c.sum);
    a.dquery = query, a.dkey = key, a.dvalue = value;
    if (sums) a.dquery_sums = at(sums, s.sums + head * s.queries * s.splits, sum_row);
    return a;
  }
};

void prepare(const Call& c, const Gradients& g) {
  const int64_t heads = c.base.heads;
  const Deal rows(c.sequences, [&](const Sequence& s) { return heads * blocks_of(s.queries, kRows); });
  run_tasks(rows.total, 16.0 * double(c.tokens * heads * c.base.value_width), 0, [&](int64_t task, char*) {
    const Sequence& s = rows.find(task);
    const int64_t head = task % heads, begin = task / heads * kRows;
    AttentionArgs a = g.of(c, s, head, 1);
    a.stats = at(g.stats, 2 * (head * c.tokens + s.query), c.sum);
    c.kernels.prepare[c.type](a, begin, std::min(begin + kRows, s.queries));
  });
  const int64_t step = c.kernels.query_block;
  const Deal again(c.sequences, [&](const Sequence& s) {
    return std::isinf(g.of(c, s, 0, c.group).restate_beyond) ? 0 : heads * blocks_of(s.queries, step);
  });
  const int64_t bytes = again.total ? c.most(c.kernels.backward_scratch[c.type], c.group) : 0;
  run_tasks(again.total, 0.5 * c.flops, bytes, [&](int64_t task, char* memory) {
    const Sequence& s = again.find(task);
    const int64_t head = task % heads, begin = task / heads * step;
    const AttentionArgs a = g.of(c, s, head / c.group * c.group, c.group);
    c.kernels.restate[c.type](a, 0, head % c.group, begin, std::min(begin + step, s.queries), memory);
  });
}

// How the gradients of one key head of a sequence are cut into tasks: runs of keys that also add to dquery, or keys and
// queries apart, which computes scores twice, where a sequence is a large part of all work.
struct Plan {
  int64_t key_step, query_step, key_tasks, query_tasks;
  bool together;

  Plan(const Call& c, const Gradients& g, const Sequence& s) : query_step(0), query_tasks(0) {
    const bool dkv = g.key || g.value, dquery = g.query;
    const double share = double(s.queries) * double(s.keys) * double(c.group) * 2 * num_threads();
    together = dquery && (s.splits > 1 || (dkv && share <= c.scores));
    key_step = together ? (s.splits > 1 ? kRunKeys : std::max<int64_t>(s.keys, 1)) : chunk(s.keys, c.kernels.key_block);
    key_tasks = together || dkv ? std::max<int64_t>(together, blocks_of(s.keys, key_step)) : 0;
    if (together || !dquery) return;
    query_step = chunk(s.queries, c.kernels.query_block), query_tasks = blocks_of(s.queries, query_step);
  }
  int64_t tasks() const { return key_tasks + query_tasks; }

 private:
  static int64_t chunk(int64_t n, int64_t block) {
    return std::max<int64_t>(1, blocks_of(blocks_of(n, block), 4 * num_threads())) * block;
  }
};

void keys_and_queries(const Call& c, const Gradients& g) {
  const int64_t key_heads = c.base.key_heads, kernel_bytes = c.most(c.kernels.backward_scratch[c.type], c.group);
  const int64_t width = c.base.width, value_width = c.base.value_width;
  const bool dkv = g.key || g.value;
  std::vector<Plan> plans;
  int64_t rows = 0;
  for (const Sequence& s : c.sequences) {
    plans.emplace_back(c, g, s);
    if (dkv) rows = std::max(rows, std::min(plans.back().key_step, s.keys));
  }
  const Deal tasks(c.sequences,
                   [&](const Sequence& s) { return plans[size_t(&s - c.sequences.data())].tasks() * key_heads; });
  const int64_t dkey_bytes = (rows * width * c.size + 63) / 64 * 64;
  run_tasks(
      tasks.total, 2.5 * c.flops, kernel_bytes + dkey_bytes + rows * value_width * c.size,
      [&](int64_t task, char* memory) {
        const Sequence& s = tasks.find(task);
        const Plan& plan = plans[size_t(&s - c.sequences.data())];
        const int64_t h = task % key_heads, part = task / key_heads;
        AttentionArgs a = g.of(c, s, h * c.group, c.group);
        if (part >= plan.key_tasks) {
          const int64_t begin = (part - plan.key_tasks) * plan.query_step,
                        end = std::min(begin + plan.query_step, s.queries);
          return c.kernels.backward[c.type](a, {0, 0, 0, s.keys, begin, end, 0, true, false, false, false}, memory);
        }
        const int64_t first = part * plan.key_step, last = std::min(first + plan.key_step, s.keys),
                      count = last - first;
        char *dkey = memory + kernel_bytes, *dvalue = dkey + dkey_bytes;
        if (g.key) a.dkey = at(dkey, -first * width, c.size);
        if (g.value) a.dvalue = at(dvalue, -first * value_width, c.size);
        const int64_t run = plan.together ? part : 0;
        c.kernels.backward[c.type](a, {0, 0, first, last, 0, s.queries, run, plan.together, dkv, false, false}, memory);
        const int64_t row = (s.key + first) * key_heads + h;
        const auto place = [&](const char* from, void* to, int64_t bytes) {
          if (to) copy_rows(from, count, bytes, at(to, row, bytes), key_heads * bytes);
        };
        place(dkey, g.key, width * c.size), place(dvalue, g.value, value_width * c.size);
      });
}

void finish(const Call& c, const Gradients& g) {
  if (!g.query) return;
  const int64_t heads = c.base.heads, bytes = c.base.width * c.size;
  const Deal rows(c.sequences, [&](const Sequence& s) { return heads * blocks_of(s.queries, kRows); });
  run_tasks(rows.total, 16.0 * double(c.tokens * heads * c.base.width), kRows * bytes, [&](int64_t task, char* memory) {
    const Sequence& s = rows.find(task);
    const int64_t head = task % heads, member = head % c.group * s.queries, begin = task / heads * kRows;
    const int64_t end = std::min(begin + kRows, s.queries);
    AttentionArgs a = g.of(c, s, head / c.group * c.group, c.group);
    a.dquery = at(memory, -(member + begin), bytes);
    c.kernels.finish[c.type](a, member + begin, member + end, s.splits);
    copy_rows(memory, end - begin, bytes, at(g.query, (s.query + begin) * heads + head, bytes), heads * bytes);
  });
}

// Zeros for tokens in no task: past the last sequence, and keys that no query of their sequence can see.
void clear(const Call& c, const Gradients& g) {
  std::vector<char> reached(size_t(c.key_tokens), 0);
  int64_t end = 0;
  for (const Sequence& s : c.sequences) {
    end = std::max(end, s.query + s.queries);
    std::fill_n(reached.begin() + s.key, s.keys, char(1));
  }
  const auto zero = [&](void* data, int64_t row, int64_t rows, int64_t bytes) {
    if (data && rows > 0 && bytes > 0) std::memset(at(data, row, bytes), 0, size_t(rows * bytes));
  };
  zero(g.query, end, c.tokens - end, c.base.heads * c.base.width * c.size);
  for (int64_t i = 0; i < c.key_tokens; i++) {
    if (reached[size_t(i)]) continue;
    zero(g.key, i, 1, c.base.key_heads * c.base.width * c.size);
    zero(g.value, i, 1, c.base.key_heads * c.base.value_width * c.size);
  }
}

void* written(const Call& c, const char* name, const TensorView& t, int64_t rows, int64_t heads, int64_t width) {
  if (!t.defined()) return nullptr;
  check_output(kOp, name, t, {rows, heads, width}, c.dtype);
  prefer_huge_pages(t.data(), t.numel() * c.size);
  return t.data();
}

void backward(const TensorView& dquery, const TensorView& dkey, const TensorView& dvalue, const InputView& dout,
              const TensorView& dlse, const InputView& query, const InputView& key, const InputView& value,
              const TensorView& starts_q, const TensorView& starts_k, const InputView& out, const TensorView& stats,
              double scale, int64_t left, int64_t right, bool bottom_right) {
  Call c(query, key, value, starts_q, starts_k, scale, left, right, bottom_right);
  AttentionArgs& a = c.base;
  a.dout = c.input("dout", dout, c.tokens, a.heads, a.value_width);
  a.out = c.input("out", out, c.tokens, a.heads, a.value_width);
  if (dlse.defined()) {
    check_tensor(kOp, "dlse", dlse, {c.tokens, a.heads}, wide(c.dtype));
    a.dlse = {dlse.data(), 0, dlse.stride(1), dlse.stride(0)};
  }
  check_output(kOp, "stats", stats, {a.heads, c.tokens, 2}, wide(c.dtype));
  Gradients g{};
  g.stats = stats.data();
  g.query = written(c, "dquery", dquery, c.tokens, a.heads, a.width);
  g.key = written(c, "dkey", dkey, c.key_tokens, a.key_heads, a.width);
  g.value = written(c, "dvalue", dvalue, c.key_tokens, a.key_heads, a.value_width);
  pybind11::gil_scoped_release nogil;
  clear(c, g);
  if (a.heads == 0) return;
  const int64_t rows = c.tokens * a.heads * c.sum;
  Scratch scratch;
  g.base = scratch.take<char>(rows), g.unit = scratch.take<char>(rows), g.delta = scratch.take<char>(rows);
  g.sum_row = padded16(a.width) * c.sum;
  if (g.query) g.sums = scratch.take<char>(c.sum_rows * g.sum_row);
  prepare(c, g);
  keys_and_queries(c, g);
  finish(c, g);
}

}  // namespace

void bind_attention_varlen(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("attention_varlen", &forward, py::arg("out"), py::arg("lse"), py::arg("stats"), py::arg("query"),
        py::arg("key"), py::arg("value"), py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("scale"),
        py::arg("left"), py::arg("right"), py::arg("bottom_right"));
  m.def("attention_varlen_backward", &backward, py::arg("dquery"), py::arg("dkey"), py::arg("dvalue"), py::arg("dout"),
        py::arg("dlse"), py::arg("query"), py::arg("key"), py::arg("value"), py::arg("cu_seqlens_q"),
        py::arg("cu_seqlens_k"), py::arg("out"), py::arg("stats"), py::arg("scale"), py::arg("left"), py::arg("right"),
        py::arg("bottom_right"));
}

}  // namespace mk::cpu
