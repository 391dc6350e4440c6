// attention of sequences laid end to end, host side: every sequence is a call of the kernels of attention, with the
// same blocks, so it has the bits it has alone. Forward, and the Python binding.
#include <limits>

#include "cpu/attention_varlen_host.h"

namespace mk::cpu {
namespace {

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
             double scale, double softcap, int64_t left, int64_t right, bool bottom_right) {
  const Call c(query, key, value, starts_q, starts_k, scale, softcap, left, right, bottom_right);
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

}  // namespace

void bind_attention_varlen(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("attention_varlen", &forward, py::arg("out"), py::arg("lse"), py::arg("stats"), py::arg("query"),
        py::arg("key"), py::arg("value"), py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("scale"),
        py::arg("softcap"), py::arg("left"), py::arg("right"), py::arg("bottom_right"));
  m.def("attention_varlen_backward", &attention_varlen_backward, py::arg("dquery"), py::arg("dkey"), py::arg("dvalue"),
        py::arg("dout"), py::arg("dlse"), py::arg("query"), py::arg("key"), py::arg("value"), py::arg("cu_seqlens_q"),
        py::arg("cu_seqlens_k"), py::arg("out"), py::arg("stats"), py::arg("scale"), py::arg("softcap"),
        py::arg("left"), py::arg("right"), py::arg("bottom_right"));
}

}  // namespace mk::cpu
