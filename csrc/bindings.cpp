// The one pybind11 file of the CPU extension. A new op: declare bind_<op> and call it, once each, in the list below.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/calls.h"
#include "common/cpu_features.h"
#include "common/large_tensor.h"
#include "common/parallel.h"
#include "common/tensor_view.h"

namespace py = pybind11;

#define MK_OPS(OP)        \
  OP(allocation)          \
  OP(attention)           \
  OP(attention_varlen)    \
  OP(content)             \
  OP(crc32c)              \
  OP(dnc_sequence)        \
  OP(gru_gates)           \
  OP(hopfield_retrieve)   \
  OP(link)                \
  OP(location_address)    \
  OP(lstm_gates)          \
  OP(lstm_options)        \
  OP(memory_read)         \
  OP(memory_write)        \
  OP(merge_attention)     \
  OP(ntm_sequence)        \
  OP(paged_attention)     \
  OP(product_key_search)  \
  OP(quantized_attention) \
  OP(recurrent)           \
  OP(retrieval_attention) \
  OP(segment_attention)   \
  OP(store_keys)          \
  OP(store_move)          \
  OP(store_rows)          \
  OP(store_table)         \
  OP(topk_read)           \
  OP(usage)               \
  OP(vec_math)            \
  OP(weighted_bag)

namespace mk::cpu {
#define MK_DECLARE(name) void bind_##name(py::module_& m);
MK_OPS(MK_DECLARE)
#undef MK_DECLARE
}  // namespace mk::cpu

namespace {

std::vector<std::string> names(const std::vector<mk::Level>& levels) {
  std::vector<std::string> out;
  for (mk::Level level : levels) out.push_back(mk::level_name(level));
  return out;
}

void bind(const py::capsule& exchange, uintptr_t parallel_for, uintptr_t num_threads) {
  mk::dlpack::bind_exchange(exchange);
  mk::threads() = {reinterpret_cast<mk::TorchParallelFor>(parallel_for),
                   reinterpret_cast<mk::TorchNumThreads>(num_threads), getpid()};
}

// For the tests of parallel.h: how often each item was visited, and the ranks a team of `size` really ran with.
std::vector<int64_t> parallel_visits(int64_t n, int64_t grain) {
  std::vector<int64_t> visits(n, 0);
  mk::parallel_for(n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) visits[i]++;
  });
  return visits;
}
int64_t team_rounds(int size, int64_t rounds) {
  std::atomic<int64_t> sum{0};
  mk::team(size, [&](int rank, int members, mk::Barrier& barrier) {
    for (int64_t i = 0; i < rounds; i++) {
      if (i % members == rank) sum.fetch_add(1);
      barrier.wait();
      if (sum.load() < i + 1) throw std::runtime_error("barrier let a rank run ahead");
    }
  });
  return sum.load();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of memkernels; arguments are torch tensors, outputs are allocated by the caller.";
  m.def("bind", &bind, py::arg("exchange_api"), py::arg("parallel_for"), py::arg("num_threads"),
        "Hands over torch's DLPack exchange API and the addresses of its parallel shims; once, before any op.");
  mk::bind_calls(m);
  mk::bind_large_tensor(m);
  m.def("cpu_level", [] { return std::string(mk::level_name(mk::cpu_level())); });
  m.def("set_cpu_level", &mk::set_cpu_level, py::arg("level"));
  m.def("built_levels", [] { return names(mk::built_levels()); });
  m.def("supported_levels", [] { return names(mk::supported_levels()); });
  m.def("num_threads", &mk::num_threads);
  m.def("parallel_visits", &parallel_visits, py::call_guard<py::gil_scoped_release>());
  m.def("team_rounds", &team_rounds, py::call_guard<py::gil_scoped_release>());
#define MK_BIND(name) mk::cpu::bind_##name(m);
  MK_OPS(MK_BIND)
#undef MK_BIND
}
