// attention of sequences laid end to end, host side of backward: gradients of a key head are written by the kernels of
// attention to scratch, and copied from there to where the layout of the call has them.
#include <cmath>

#include "common/pages.h"
#include "cpu/attention_varlen_host.h"

namespace mk::cpu {
namespace {

constexpr int64_t kRows = 256;  // of a task that passes over rows once

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

}  // namespace

void attention_varlen_backward(const TensorView& dquery, const TensorView& dkey, const TensorView& dvalue,
                               const InputView& dout, const TensorView& dlse, const InputView& query,
                               const InputView& key, const InputView& value, const TensorView& starts_q,
                               const TensorView& starts_k, const InputView& out, const TensorView& stats, double scale,
                               double softcap, int64_t left, int64_t right, bool bottom_right) {
  Call c(query, key, value, starts_q, starts_k, scale, softcap, left, right, bottom_right);
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

}  // namespace mk::cpu
