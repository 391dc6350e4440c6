// quantized_attention, host side: checks, the split into tasks, the Python binding.
#include "cpu/quantized_attention.h"

#include "common/arena.h"
#include "common/checks.h"
#include "common/parallel.h"
#include "cpu/select.h"

namespace mk::cpu {
namespace {

constexpr const char* kOp = "quantized_attention";
// Runs of a fixed length, whatever the number of threads and of batch entries: the order of additions depends on it.
constexpr int64_t kRunKeys = 4096;

DType wide(DType dtype) { return dtype == DType::float64 ? dtype : DType::float32; }

QuantizedTensor checked(const char* name, const TensorView& t, std::initializer_list<int64_t> sizes, DType dtype) {
  if (!t.defined()) return {};
  check_tensor(kOp, name, t, sizes, dtype);
  return {t.data(), t.stride(0), t.stride(1), t.stride(2)};
}

QuantizedTensor inner(const char* name, const TensorView& t, std::initializer_list<int64_t> sizes, DType dtype) {
  if (t.defined()) check_inner(kOp, name, t);
  return checked(name, t, sizes, dtype);
}

QuantizedAttentionArgs arguments(const TensorView& query, const TensorView& key, const TensorView& value,
                                 const TensorView& key_scale, const TensorView& value_scale, const TensorView& lengths,
                                 double scale) {
  check_rank(kOp, "query", query, 4), check_rank(kOp, "key", key, 4), check_rank(kOp, "value", value, 4);
  check_float(kOp, "query", query);
  QuantizedAttentionArgs a{};
  a.batch = query.size(0), a.heads = query.size(1), a.queries = query.size(2), a.width = query.size(3);
  a.key_heads = key.size(1), a.keys = key.size(2), a.value_width = value.size(3);
  if (a.key_heads ? a.heads % a.key_heads : a.heads)
    fail(kOp, "key", "a head count that divides the query's", describe(key));
  const DType scales = wide(query.dtype());
  a.query = inner("query", query, {a.batch, a.heads, a.queries, a.width}, query.dtype());
  a.key = inner("key", key, {a.batch, a.key_heads, a.keys, a.width}, DType::int8);
  a.value = inner("value", value, {a.batch, a.key_heads, a.keys, a.value_width}, DType::int8);
  a.key_scale = inner("key_scale", key_scale, {a.batch, a.key_heads, a.keys}, scales);
  a.value_scale = inner("value_scale", value_scale, {a.batch, a.key_heads, a.keys}, scales);
  if (lengths.defined()) {
    check_tensor(kOp, "lengths_k", lengths, {a.batch}, DType::int64);
    a.lengths = lengths.data<const int64_t>(), a.lengths_b = lengths.stride(0);
  }
  a.scale = scale, a.split_keys = kRunKeys, a.splits = std::max<int64_t>(1, (a.keys + kRunKeys - 1) / kRunKeys);
  return a;
}

// Calls body(part, scratch) for every key head, block of query rows and split.
template <class Body>
void for_parts(const QuantizedAttentionArgs& a, int64_t scratch_bytes, int64_t most_rows, const Body& body) {
  if (a.batch * a.heads * a.queries == 0) return;
  const int64_t rows = a.heads / a.key_heads * a.queries, blocks = (rows + most_rows - 1) / most_rows;
  const int64_t elements = std::min(rows, most_rows) * std::min(a.keys, a.split_keys) * (a.width + a.value_width + 16);
  parallel_for(a.batch * a.key_heads * blocks * a.splits, grain_for(elements), [&](int64_t begin, int64_t end) {
    Scratch mine;
    void* memory = mine.take<char>(scratch_bytes);
    for (int64_t task = begin; task < end; task++) {
      const int64_t block = task / a.splits % blocks, head = task / a.splits / blocks;
      body({head / a.key_heads, head % a.key_heads, block * most_rows, std::min((block + 1) * most_rows, rows),
            task % a.splits},
           memory);
    }
  });
}

void forward(const TensorView& out, const TensorView& lse, const TensorView& stats, const TensorView& total,
             const InputView& query, const InputView& key, const InputView& value, const InputView& key_scale,
             const InputView& value_scale, const TensorView& lengths, double scale) {
  QuantizedAttentionArgs a = arguments(query, key, value, key_scale, value_scale, lengths, scale);
  const DType dtype = query.dtype();
  check_output(kOp, "out", out, {a.batch, a.heads, a.queries, a.value_width}, dtype);
  check_output(kOp, "lse", lse, {a.batch, a.heads, a.queries}, wide(dtype));
  check_output(kOp, "stats", stats, {a.batch, a.heads, a.queries, 2}, wide(dtype));
  check_output(kOp, "total", total, {a.batch, a.heads, a.queries, a.value_width}, wide(dtype));
  a.out = out.data(), a.lse = lse.data(), a.stats = stats.data(), a.total = total.data();
  const auto& kernels = select(quantized_attention_levels);
  const int type = int(dtype);
  pybind11::gil_scoped_release nogil;
  const int64_t rows = a.batch * a.heads * a.queries, slot = (a.value_width + 2) * item_size(wide(dtype));
  Scratch partials;
  if (a.splits > 1) a.partial = partials.take<char>(a.splits * rows * slot);
  for_parts(a, kernels.scratch[type](a), kernels.rows,
            [&](const QuantizedPart& part, void* memory) { kernels.forward[type](a, part, memory); });
  if (a.splits > 1)
    parallel_for(rows, grain_for(a.splits * slot),
                 [&](int64_t begin, int64_t end) { kernels.merge[type](a, begin, end); });
}

void backward(const TensorView& dquery, const InputView& dout, const TensorView& dlse, const InputView& query,
              const InputView& key, const InputView& value, const InputView& key_scale, const InputView& value_scale,
              const TensorView& lengths, const TensorView& stats, const TensorView& total, double scale) {
  QuantizedAttentionArgs a = arguments(query, key, value, key_scale, value_scale, lengths, scale);
  const DType dtype = query.dtype();
  a.dout = inner("dout", dout, {a.batch, a.heads, a.queries, a.value_width}, dtype);
  a.dlse = checked("dlse", dlse, {a.batch, a.heads, a.queries}, wide(dtype));
  check_output(kOp, "stats", stats, {a.batch, a.heads, a.queries, 2}, wide(dtype));
  check_output(kOp, "total", total, {a.batch, a.heads, a.queries, a.value_width}, wide(dtype));
  check_output(kOp, "dquery", dquery, {a.batch, a.heads, a.queries, a.width}, dtype);
  a.stats = stats.data(), a.total = total.data(), a.dquery = dquery.data();
  const auto& kernels = select(quantized_attention_levels);
  const int type = int(dtype);
  pybind11::gil_scoped_release nogil;
  const int64_t rows = a.batch * a.heads * a.queries, slot = a.width * item_size(wide(dtype));
  Scratch partials;
  a.partial = partials.take<char>(a.splits * rows * slot);
  for_parts(a, kernels.scratch[type](a), kernels.rows,
            [&](const QuantizedPart& part, void* memory) { kernels.backward[type](a, part, memory); });
  parallel_for(rows, grain_for(a.splits * slot),
               [&](int64_t begin, int64_t end) { kernels.finish[type](a, begin, end); });
}

}  // namespace

void bind_quantized_attention(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("quantized_attention", &forward, py::arg("out"), py::arg("lse"), py::arg("stats"), py::arg("total"),
        py::arg("query"), py::arg("key"), py::arg("value"), py::arg("key_scale"), py::arg("value_scale"),
        py::arg("lengths_k"), py::arg("scale"));
  m.def("quantized_attention_backward", &backward, py::arg("dquery"), py::arg("dout"), py::arg("dlse"),
        py::arg("query"), py::arg("key"), py::arg("value"), py::arg("key_scale"), py::arg("value_scale"),
        py::arg("lengths_k"), py::arg("stats"), py::arg("total"), py::arg("scale"));
}

}  // namespace mk::cpu
