// segment_attention, host side: checks, the transposed graph, the split into tasks, the Python binding.
#include "cpu/segment_attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "common/checks.h"
#include "common/tasks.h"
#include "cpu/select.h"

namespace mk::cpu {
namespace {

constexpr const char* kOp = "segment_attention";
constexpr int64_t kTask = 512;  // edges and rows of a task of whole rows

SegmentTensor checked(const char* name, const TensorView& t, std::initializer_list<int64_t> sizes, DType dtype) {
  if (!t.defined()) return {};
  check_tensor(kOp, name, t, sizes, dtype);
  check_inner(kOp, name, t);
  return {t.data(), t.stride(0), t.stride(1), t.size(2)};
}

DType wide(DType dtype) { return dtype == DType::float64 ? dtype : DType::float32; }
int64_t sum_size(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

struct Inputs {
  const InputView &query, &key, &value, &ptr, &index, &bias;
};

SegmentArgs arguments(const Inputs& in, double scale) {
  check_rank(kOp, "query", in.query, 3), check_rank(kOp, "key", in.key, 3), check_rank(kOp, "value", in.value, 3);
  check_float(kOp, "query", in.query);
  check_rank(kOp, "index", in.index, 1);
  const DType dtype = in.query.dtype();
  const int64_t nodes = in.query.size(0), heads = in.query.size(1), width = in.query.size(2);
  const int64_t sources = in.key.size(0), edges = in.index.size(0);
  SegmentArgs a{};
  a.heads = heads, a.nodes = nodes, a.scale = scale;
  a.side.own_left = checked("query", in.query, {nodes, heads, width}, dtype);
  a.side.near_left = checked("key", in.key, {sources, heads, width}, dtype);
  a.side.near_right = checked("value", in.value, {sources, heads, in.value.size(2)}, dtype);
  check_tensor(kOp, "ptr", in.ptr, {nodes + 1}, DType::int64);
  check_tensor(kOp, "index", in.index, {edges}, DType::int64);
  if (in.bias.defined()) {
    check_tensor(kOp, "edge_bias", in.bias, {edges, heads}, dtype);
    check_inner(kOp, "edge_bias", in.bias);
    a.bias = in.bias.data(), a.bias_e = in.bias.stride(0);
  }
  a.side.ptr = in.ptr.data<const int64_t>(), a.side.near = in.index.data<const int64_t>();
  a.side.rows = nodes, a.side.edges = edges;
  return a;
}

// The values of ptr and index; the sources are as many as `key` has rows.
void check_graph(const SegmentArgs& a, int64_t sources) {
  const int64_t* ptr = a.side.ptr;
  bool good = ptr[0] == 0 && ptr[a.nodes] == a.side.edges;
  for (int64_t i = 0; i < a.nodes; i++) good &= ptr[i] <= ptr[i + 1];
  if (!good)
    fail(kOp, "ptr", "offsets from 0 to E=" + std::to_string(a.side.edges) + " that do not decrease",
         std::to_string(ptr[0]) + " to " + std::to_string(ptr[a.nodes]));
  std::atomic<bool> outside{false};
  parallel_for(a.side.edges, 65536, [&](int64_t begin, int64_t end) {
    bool bad = false;
    for (int64_t e = begin; e < end; e++) bad |= uint64_t(a.side.near[e]) >= uint64_t(sources);
    if (bad) outside = true;
  });
  if (outside)
    throw std::out_of_range(std::string(kOp) + ": index: expected values in 0..Ns-1=" + std::to_string(sources - 1) +
                            ", got one outside");
}

using RowsKernel = void (*)(const SegmentArgs&, int64_t, int64_t, void*);
using RunKernel = void (*)(const SegmentArgs&, int64_t, int64_t, int64_t, void*, void*);
using JoinKernel = void (*)(const SegmentArgs&, int64_t, void*, int64_t);

struct Run {
  int64_t row, first, last;
};

// All rows of one side: those of one run in tasks of about kTask edges and rows, the runs of the others task by task.
// `aside` is one task more.
template <class Aside>
void over_rows(const SegmentArgs& a, int64_t size, double flops, RowsKernel rows, RunKernel run, JoinKernel join,
               const Aside& aside, int64_t asides) {
  const SegmentSide& side = a.side;
  std::vector<Run> runs;
  for (int64_t row = 0; row < side.rows; row++)
    if (side.ptr[row + 1] - side.ptr[row] > kSegmentRun)
      for (int64_t first = side.ptr[row]; first < side.ptr[row + 1]; first += kSegmentRun)
        runs.push_back({row, first, std::min(first + kSegmentRun, side.ptr[row + 1])});
  const int64_t count = int64_t(runs.size()), slot = segment_slot(a) * size;
  Scratch scratch;
  char* slots = scratch.take<char>(count * slot);
  // The first row r at which edges and rows before it, ptr[r] + r, are at least n.
  const auto row_at = [&](int64_t n) {
    int64_t low = 0, high = side.rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (side.ptr[middle] + middle < n)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  const int64_t whole = (side.edges + side.rows + kTask - 1) / kTask;
  run_tasks(asides + count + whole, flops, segment_scratch(a) * size, [&](int64_t task, void* memory) {
    if (task < asides) return aside();
    task -= asides;
    if (task < count) return run(a, runs[task].row, runs[task].first, runs[task].last, slots + task * slot, memory);
    rows(a, row_at((task - count) * kTask), row_at((task - count + 1) * kTask), memory);
  });
  for (int64_t begin = 0, end; begin < count; begin = end) {
    for (end = begin + 1; end < count && runs[end].row == runs[begin].row;) end++;
    join(a, runs[begin].row, slots + begin * slot, end - begin);
  }
}

double work(const SegmentArgs& a) {
  return double(a.side.edges * a.heads) * double(2 * (a.side.near_left.width + a.side.near_right.width) + 16) +
         double(a.side.rows * a.heads * 32);
}

void forward(const TensorView& out, const TensorView& lse, const TensorView& stats, const TensorView& exact,
             const InputView& query, const InputView& key, const InputView& value, const InputView& ptr,
             const InputView& index, const InputView& bias, double scale) {
  SegmentArgs a = arguments({query, key, value, ptr, index, bias}, scale);
  const DType dtype = query.dtype();
  const int64_t width = value.size(2);
  check_output(kOp, "out", out, {a.nodes, a.heads, width}, dtype);
  check_output(kOp, "lse", lse, {a.nodes, a.heads}, wide(dtype));
  check_output(kOp, "stats", stats, {a.nodes, a.heads, 2}, wide(dtype));
  if (exact.defined()) check_output(kOp, "exact", exact, {a.nodes, a.heads, width}, wide(dtype));
  a.out = out.data(), a.lse = lse.data(), a.stats = stats.data();
  a.exact = exact.defined() ? exact.data() : nullptr;
  const auto& kernels = select(segment_attention_levels);
  const int type = int(dtype);
  pybind11::gil_scoped_release nogil;
  check_graph(a, key.size(0));
  if (a.heads == 0) return;
  over_rows(
      a, sum_size(dtype), work(a), kernels.forward[type], kernels.forward_run[type], kernels.forward_join[type], [] {},
      0);
}

// The graph seen from its sources: the edges of each in their own order.
struct Transposed {
  int64_t *ptr, *near, *edge;

  void build(const SegmentSide& side, int64_t sources) {
    std::memset(ptr, 0, size_t(sources + 1) * 8);
    for (int64_t e = 0; e < side.edges; e++) ptr[side.near[e]]++;
    for (int64_t s = 0, sum = 0; s <= sources; s++) {
      const int64_t count = s < sources ? ptr[s] : 0;
      ptr[s] = sum, sum += count;
    }
    for (int64_t node = 0; node < side.rows; node++)
      for (int64_t e = side.ptr[node]; e < side.ptr[node + 1]; e++) {
        const int64_t place = ptr[side.near[e]]++;
        near[place] = node;
        if (edge) edge[place] = e;
      }
    for (int64_t s = sources; s > 0; s--) ptr[s] = ptr[s - 1];
    ptr[0] = 0;
  }
};

// The sides of backward: along the nodes, and along the sources with what is own and what is near exchanged.
SegmentSide along_sources(const SegmentSide& nodes, const Transposed& graph, int64_t sources) {
  SegmentSide side = nodes;
  side.ptr = graph.ptr, side.near = graph.near, side.edge = graph.edge, side.rows = sources;
  std::swap(side.own_left, side.near_left), std::swap(side.own_right, side.near_right);
  side.numbers_near = true;
  return side;
}

void both_sides(SegmentArgs& a, int64_t sources, DType dtype, void* dkey, void* dvalue) {
  const auto& kernels = select(segment_attention_levels);
  const int type = int(dtype);
  const int64_t size = sum_size(dtype);
  Scratch scratch;
  a.numbers = scratch.take<char>(a.nodes * 3 * segment_heads(a.heads) * size);
  parallel_for(a.nodes, grain_for(2 * a.heads * a.dout.width * size),
               [&](int64_t begin, int64_t end) { kernels.prepare[type](a, begin, end); });
  const auto run = [&](double flops, const auto& aside, int64_t asides) {
    over_rows(a, size, flops, kernels.backward[type], kernels.backward_run[type], kernels.backward_join[type], aside,
              asides);
  };
  const bool nodes_too = a.side.dleft || a.side.dbias, sources_too = dkey || dvalue;
  Transposed graph{};
  if (sources_too) {
    graph.ptr = scratch.take<int64_t>(sources + 1), graph.near = scratch.take<int64_t>(a.side.edges);
    graph.edge = a.bias ? scratch.take<int64_t>(a.side.edges) : nullptr;
  }
  const auto transpose = [&] { graph.build(a.side, sources); };
  if (nodes_too)
    run(2 * work(a), transpose, sources_too);
  else if (sources_too)
    transpose();
  if (!sources_too) return;
  a.side = along_sources(a.side, graph, sources);
  a.side.dleft = dkey, a.side.dright = dvalue, a.side.dbias = nullptr;
  run(
      3 * work(a), [] {}, 0);
}

void backward(const TensorView& dquery, const TensorView& dkey, const TensorView& dvalue, const TensorView& dbias,
              const InputView& dout, const TensorView& dlse, const InputView& query, const InputView& key,
              const InputView& value, const InputView& ptr, const InputView& index, const InputView& bias,
              const TensorView& out, const TensorView& stats, const TensorView& exact, double scale) {
  SegmentArgs a = arguments({query, key, value, ptr, index, bias}, scale);
  const DType dtype = query.dtype();
  const int64_t nodes = a.nodes, heads = a.heads, sources = key.size(0), width = value.size(2);
  const auto gradient = [&](const char* name, const TensorView& t, std::initializer_list<int64_t> sizes) -> void* {
    if (!t.defined()) return nullptr;
    check_output(kOp, name, t, sizes, dtype);
    return t.data();
  };
  a.side.dleft = gradient("dquery", dquery, {nodes, heads, query.size(2)});
  void* dkeys = gradient("dkey", dkey, {sources, heads, query.size(2)});
  void* dvalues = gradient("dvalue", dvalue, {sources, heads, width});
  a.side.dbias = gradient("dedge_bias", dbias, {a.side.edges, heads});
  a.side.own_right = a.dout = checked("dout", dout, {nodes, heads, width}, dtype);
  a.side.own_right.width = width;
  if (!dout.defined()) a.side.near_right.data = nullptr;
  if (dlse.defined()) {
    check_tensor(kOp, "dlse", dlse, {nodes, heads}, wide(dtype));
    a.dlse = {dlse.data(), dlse.stride(0), dlse.stride(1), 1};
  }
  check_output(kOp, "out", out, {nodes, heads, width}, dtype);
  check_output(kOp, "stats", stats, {nodes, heads, 2}, wide(dtype));
  a.saved_exact = exact.defined() && exact.ndim() == 3;
  if (a.saved_exact) check_output(kOp, "exact", exact, {nodes, heads, width}, wide(dtype));
  a.saved_out = a.saved_exact ? exact.data() : out.data(), a.saved_stats = stats.data();
  pybind11::gil_scoped_release nogil;
  check_graph(a, sources);
  if (heads) both_sides(a, sources, dtype, dkeys, dvalues);
}

}  // namespace

void bind_segment_attention(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("segment_attention", &forward, py::arg("out"), py::arg("lse"), py::arg("stats"), py::arg("exact"),
        py::arg("query"), py::arg("key"), py::arg("value"), py::arg("ptr"), py::arg("index"), py::arg("edge_bias"),
        py::arg("scale"));
  m.def("segment_attention_backward", &backward, py::arg("dquery"), py::arg("dkey"), py::arg("dvalue"),
        py::arg("dedge_bias"), py::arg("dout"), py::arg("dlse"), py::arg("query"), py::arg("key"), py::arg("value"),
        py::arg("ptr"), py::arg("index"), py::arg("edge_bias"), py::arg("out"), py::arg("stats"), py::arg("exact"),
        py::arg("scale"));
}

}  // namespace mk::cpu
