// paged_attention, host side: checks, the split into tasks, and the backward, which gathers the keys of one row and
// head at a time, widened to the accumulation type, for the kernels of attention.
#include "cpu/paged_attention.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "common/checks.h"
#include "cpu/attention_host.h"
#include "cpu/select.h"

namespace mk::cpu {
namespace {

constexpr const char* kOp = "paged_attention";
// Of one task, whatever the number of threads: a multiple of the kernel's tile.
constexpr int64_t kPagedRun = 1024;

// The checked arguments, and copies of the pages that are used.
struct Call {
  PagedArgs args{};
  DType dtype;
  int64_t batch, pages;
  std::vector<int64_t> table, lengths, partial_at;
  int64_t runs = 0, keys = 0;  // runs of all rows, keys of all rows

  Call(const TensorView& query, const TensorView& key, const TensorView& value, const TensorView& page_table,
       const TensorView& length, double scale, bool causal)
      : dtype(query.dtype()) {
    check_rank(kOp, "query", query, 4), check_rank(kOp, "key_pages", key, 4);
    check_rank(kOp, "value_pages", value, 4), check_rank(kOp, "page_table", page_table, 2);
    check_float(kOp, "query", query);
    PagedArgs& a = args;
    batch = query.size(0), pages = key.size(0);
    a.heads = query.size(1), a.queries = query.size(2), a.slots = key.size(1), a.key_heads = key.size(2);
    check_tensor(kOp, "key_pages", key, {pages, a.slots, a.key_heads, query.size(3)}, dtype);
    check_tensor(kOp, "value_pages", value, {pages, a.slots, a.key_heads, value.size(3)}, dtype);
    check_tensor(kOp, "page_table", page_table, {batch, page_table.size(1)}, DType::int64);
    check_tensor(kOp, "lengths", length, {batch}, DType::int64);
    check_inner(kOp, "query", query), check_inner(kOp, "key_pages", key), check_inner(kOp, "value_pages", value);
    if (a.key_heads ? a.heads % a.key_heads : a.heads)
      fail(kOp, "key_pages", "a head count that divides the query's", describe(key));
    a.query = query.data(), a.query_b = query.stride(0), a.query_h = query.stride(1), a.query_q = query.stride(2);
    a.key = {key.data(), key.stride(0), key.stride(1), key.stride(2), key.size(3)};
    a.value = {value.data(), value.stride(0), value.stride(1), value.stride(2), value.size(3)};
    a.scale = scale, a.causal = causal, a.most = page_table.size(1), a.run_keys = kPagedRun;
    read(page_table, length);
    a.pages = table.data(), a.lengths = lengths.data(), a.partial_at = partial_at.data();
  }
  int64_t runs_of(int64_t b) const { return std::max<int64_t>(1, blocks_of(lengths[size_t(b)], kPagedRun)); }

 private:
  void read(const TensorView& page_table, const TensorView& length) {
    const PagedArgs& a = args;
    table.assign(size_t(batch * a.most), 0);
    for (int64_t b = 0; b < batch; b++) {
      const int64_t n = length.data<const int64_t>()[b * length.stride(0)];
      if (n < 0 || n > a.most * a.slots)
        fail(kOp, "lengths", "values in 0.." + std::to_string(a.most * a.slots),
             std::to_string(n) + " in row " + std::to_string(b));
      lengths.push_back(n), partial_at.push_back(runs);
      runs += runs_of(b), keys += n;
      for (int64_t m = 0; a.slots && m < blocks_of(n, a.slots); m++) {
        const int64_t page = page_table.data<const int64_t>()[b * page_table.stride(0) + m * page_table.stride(1)];
        if (page < 0 || page >= pages)
          throw pybind11::index_error(std::string(kOp) + ": page_table: expected pages in 0.." +
                                      std::to_string(pages - 1) + ", got " + std::to_string(page) + " in row " +
                                      std::to_string(b));
        table[size_t(b * a.most + m)] = page;
      }
    }
  }
};

void forward(const TensorView& out, const TensorView& lse, const TensorView& stats, const InputView& query,
             const InputView& key, const InputView& value, const TensorView& page_table, const TensorView& lengths,
             double scale, bool causal) {
  Call c(query, key, value, page_table, lengths, scale, causal);
  PagedArgs& a = c.args;
  check_output(kOp, "out", out, {c.batch, a.heads, a.queries, a.value.width}, c.dtype);
  check_output(kOp, "lse", lse, {c.batch, a.heads, a.queries}, wide(c.dtype));
  check_output(kOp, "stats", stats, {c.batch, a.heads, a.queries, 2}, wide(c.dtype));
  a.out = out.data(), a.lse = lse.data(), a.stats = stats.data();
  const PagedKernels& kernels = select(paged_attention_levels);
  const int type = int(c.dtype);
  pybind11::gil_scoped_release nogil;
  if (a.heads * a.queries == 0) return;
  const int64_t step = kernels.query_group, groups = blocks_of(a.queries, step);
  Scratch partials;
  if (c.runs > c.batch)
    a.partial = partials.take<char>(c.runs * a.heads * a.queries * (a.value.width + 2) * sum_size(c.dtype));
  const double flops = 2.0 * double(c.keys) * double(a.heads * a.queries * (a.key.width + a.value.width + 16));
  run_tasks(c.runs * groups, flops, kernels.forward_scratch[type](a), [&](int64_t task, void* scratch) {
    const int64_t begin = task % groups * step, run = task / groups;
    const int64_t b = std::upper_bound(c.partial_at.begin(), c.partial_at.end(), run) - c.partial_at.begin() - 1;
    kernels.forward[type](a, b, run - a.partial_at[b], begin, std::min(begin + step, a.queries), scratch);
  });
  if (c.runs == c.batch) return;
  run_tasks(c.batch, double(c.runs * a.heads * a.queries * a.value.width), 0, [&](int64_t b, void*) {
    if (c.runs_of(b) > 1) kernels.merge[type](a, b, c.runs_of(b));
  });
}

// What backward is given, and what it writes; a gradient nobody needs is null.
struct Gradients {
  const TensorView &dout, &dlse, &out, &stats;
  void *dquery, *dkey, *dvalue;
};

template <class A, class T>
void widen(const T* from, int64_t stride, int64_t rows, int64_t width, A* to) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < width; j++) to[i * width + j] = to_float(from[i * stride + j]);
}

// The gradients of one key head, row by row of the batch: sums over rows that share a page are added in their order.
template <class A, class T>
class HeadBackward {
 public:
  HeadBackward(const Call& c, const Gradients& g, int64_t h, A* dkey, A* dvalue)
      : c_(c), g_(g), p_(c.args), h_(h), group_(p_.heads / p_.key_heads), dkey_(dkey), dvalue_(dvalue) {}

  void row(int64_t b) {
    const int64_t keys = c_.lengths[size_t(b)], queries = p_.queries, rows = group_ * queries,
                  place = (b * p_.heads + h_ * group_) * queries;
    const int64_t width = p_.key.width, value_width = p_.value.width;
    Scratch scratch;
    AttentionArgs a{};
    a.batch = 1, a.heads = group_, a.key_heads = 1, a.queries = queries, a.keys = a.seen_keys = keys;
    a.width = width, a.value_width = value_width, a.scale = p_.scale;
    a.left = -1, a.right = p_.causal ? 0 : -1, a.shift = p_.causal ? keys - queries : 0;
    a.splits = 1, a.split_keys = std::max<int64_t>(keys, 1), a.restate_beyond = 8;
    a.key = gathered(scratch, p_.key, b, keys), a.value = gathered(scratch, p_.value, b, keys);
    const auto of_head = [&](const void* data, int64_t s_b, int64_t s_h, int64_t s_q, int64_t w) -> AttentionTensor {
      A* to = scratch.take<A>(rows * w);
      for (int64_t i = 0; i < group_; i++)
        widen(static_cast<const T*>(data) + b * s_b + (h_ * group_ + i) * s_h, s_q, queries, w, to + i * queries * w);
      return {to, 0, queries * w, w};
    };
    a.query = of_head(p_.query, p_.query_b, p_.query_h, p_.query_q, width);
    const auto view = [&](const TensorView& t) {
      return of_head(t.data(), t.stride(0), t.stride(1), t.stride(2), value_width);
    };
    if (g_.dout.defined()) a.dout = view(g_.dout), a.out = view(g_.out);
    if (g_.dlse.defined()) {
      const TensorView& t = g_.dlse;
      a.dlse = {static_cast<A*>(t.data()) + b * t.stride(0) + h_ * group_ * t.stride(1), 0, t.stride(1), t.stride(2)};
    }
    a.stats = static_cast<A*>(g_.stats.data()) + 2 * place;
    a.rows_base = scratch.take<A>(rows), a.rows_unit = scratch.take<A>(rows), a.rows_delta = scratch.take<A>(rows);
    if (g_.dquery) a.dquery_sums = scratch.take<A>(rows * padded16(width)), a.dquery = scratch.take<A>(rows * width);
    if (dkey_) a.dkey = scratch.take<A>(keys * width);
    if (dvalue_) a.dvalue = scratch.take<A>(keys * value_width);
    run(a, scratch);
    if (g_.dquery) {
      T* to = static_cast<T*>(g_.dquery) + place * width;
      for (int64_t i = 0; i < rows * width; i++) to[i] = convert<T>::from(static_cast<A*>(a.dquery)[i]);
    }
    if (dkey_) add(static_cast<A*>(a.dkey), b, keys, width, dkey_);
    if (dvalue_) add(static_cast<A*>(a.dvalue), b, keys, value_width, dvalue_);
  }

 private:
  AttentionTensor gathered(Scratch& scratch, const PagedRows& t, int64_t b, int64_t keys) const {
    A* to = scratch.take<A>(keys * t.width);
    for (int64_t k = 0; k < keys; k++) {
      const int64_t page = p_.pages[b * p_.most + k / p_.slots];
      widen(static_cast<const T*>(t.data) + page * t.page + k % p_.slots * t.slot + h_ * t.head, 0, 1, t.width,
            to + k * t.width);
    }
    return {to, 0, 0, t.width};
  }

  void run(const AttentionArgs& a, Scratch& scratch) const {
    const AttentionKernels& kernels = select(attention_levels);
    const int type = int(sizeof(A) == 8 ? DType::float64 : DType::float32);
    const int64_t rows = group_ * a.queries;
    void* memory = scratch.take<char>(kernels.backward_scratch[type](a));
    kernels.prepare[type](a, 0, rows);
    // Forward summed the products of large scores in another order.
    for (int64_t i = 0; i < group_; i++) {
      kernels.restate[type](a, 0, i, 0, a.queries, memory);
      if (a.dout.data) kernels.center[type](a, 0, i, 0, a.queries, memory);
    }
    kernels.backward[type](a, {0, 0, 0, a.keys, 0, a.queries, 0, a.dquery != nullptr, a.dkey || a.dvalue, false, false},
                           memory);
    if (a.dquery) kernels.finish[type](a, 0, rows, 1);
  }

  void add(const A* from, int64_t b, int64_t keys, int64_t width, A* sums) const {
    for (int64_t k = 0; k < keys; k++) {
      const int64_t slot = p_.pages[b * p_.most + k / p_.slots] * p_.slots + k % p_.slots;
      A* to = sums + (slot * p_.key_heads + h_) * width;
      for (int64_t j = 0; j < width; j++) to[j] += from[k * width + j];
    }
  }

  const Call& c_;
  const Gradients& g_;
  const PagedArgs& p_;
  int64_t h_, group_;
  A *dkey_, *dvalue_;
};

template <class A, class T>
void all_heads(const Call& c, const Gradients& g) {
  const PagedArgs& a = c.args;
  Scratch scratch;
  const int64_t slots = c.pages * a.slots * a.key_heads;
  const auto sums = [&](void* gradient, int64_t width) -> A* {
    if (!gradient) return nullptr;
    A* to = sizeof(A) == sizeof(T) ? static_cast<A*>(gradient) : scratch.take<A>(slots * width);
    std::fill_n(to, slots * width, A(0));
    return to;
  };
  A *dkey = sums(g.dkey, a.key.width), *dvalue = sums(g.dvalue, a.value.width);
  const double flops = 5.0 * double(c.keys) * double(a.heads * a.queries * (a.key.width + a.value.width + 16));
  if (a.heads * a.queries > 0)
    run_tasks(a.key_heads, flops, 0, [&](int64_t h, void*) {
      HeadBackward<A, T> head(c, g, h, dkey, dvalue);
      for (int64_t b = 0; b < c.batch; b++) head.row(b);
    });
  const auto rounded = [&](const A* from, void* to, int64_t n) {
    if (!to || sizeof(A) == sizeof(T)) return;
    for (int64_t i = 0; i < n; i++) static_cast<T*>(to)[i] = convert<T>::from(from[i]);
  };
  rounded(dkey, g.dkey, slots * a.key.width), rounded(dvalue, g.dvalue, slots * a.value.width);
}

void backward(const TensorView& dquery, const TensorView& dkey, const TensorView& dvalue, const InputView& dout,
              const TensorView& dlse, const InputView& query, const InputView& key, const InputView& value,
              const TensorView& page_table, const TensorView& lengths, const InputView& out, const TensorView& stats,
              double scale, bool causal) {
  const Call c(query, key, value, page_table, lengths, scale, causal);
  const PagedArgs& a = c.args;
  const auto rows = {c.batch, a.heads, a.queries, a.value.width};
  if (dout.defined()) check_tensor(kOp, "dout", dout, rows, c.dtype), check_inner(kOp, "dout", dout);
  if (dlse.defined()) check_tensor(kOp, "dlse", dlse, {c.batch, a.heads, a.queries}, wide(c.dtype));
  check_tensor(kOp, "out", out, rows, c.dtype);
  check_output(kOp, "stats", stats, {c.batch, a.heads, a.queries, 2}, wide(c.dtype));
  const auto written = [&](const char* name, const TensorView& t, std::initializer_list<int64_t> sizes) -> void* {
    if (!t.defined()) return nullptr;
    check_output(kOp, name, t, sizes, c.dtype);
    return t.data();
  };
  const Gradients g{dout,
                    dlse,
                    out,
                    stats,
                    written("dquery", dquery, {c.batch, a.heads, a.queries, a.key.width}),
                    written("dkey_pages", dkey, {c.pages, a.slots, a.key_heads, a.key.width}),
                    written("dvalue_pages", dvalue, {c.pages, a.slots, a.key_heads, a.value.width})};
  pybind11::gil_scoped_release nogil;
  switch (c.dtype) {
    case DType::float64:
      return all_heads<double, double>(c, g);
    case DType::float32:
      return all_heads<float, float>(c, g);
    case DType::bfloat16:
      return all_heads<float, bfloat16>(c, g);
    default:
      return all_heads<float, float16>(c, g);
  }
}

}  // namespace

void bind_paged_attention(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("paged_attention", &forward, py::arg("out"), py::arg("lse"), py::arg("stats"), py::arg("query"),
        py::arg("key_pages"), py::arg("value_pages"), py::arg("page_table"), py::arg("lengths"), py::arg("scale"),
        py::arg("is_causal"));
  m.def("paged_attention_backward", &backward, py::arg("dquery"), py::arg("dkey_pages"), py::arg("dvalue_pages"),
        py::arg("dout"), py::arg("dlse"), py::arg("query"), py::arg("key_pages"), py::arg("value_pages"),
        py::arg("page_table"), py::arg("lengths"), py::arg("out"), py::arg("stats"), py::arg("scale"),
        py::arg("is_causal"));
}

}  // namespace mk::cpu
