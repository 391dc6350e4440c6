// memkernels._C_cuda: tensors come as views through torch's DLPack exchange API, the stream from the same table;
// nothing of torch is linked, and importing needs no driver.
#include <pybind11/pybind11.h>

#include "common/checks.h"
#include "cuda/lstm_gates.h"
#include "cuda/memory_write.h"
#include "cuda/store_table.h"

namespace py = pybind11;

namespace mk::cuda {
namespace {

#ifndef MK_DEVICE_TYPE  // the test emulator runs the kernels on host memory
#define MK_DEVICE_TYPE dlpack::kCUDA
#endif

void check(cudaError_t error, const char* op) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(error));
}

// The device of a tensor is current while this lives; `stream` is the one torch works on there.
class Launch {
 public:
  Launch(const char* op, const TensorView& t) : op_(op) {
    MK_CHECK(t.defined() && t.device().type == MK_DEVICE_TYPE, op, "device", "a CUDA tensor", describe(t));
    check(cudaGetDevice(&before_), op);
    changed_ = before_ != t.device().id;
    if (changed_) check(cudaSetDevice(t.device().id), op);
    const auto* api = dlpack::exchange();
    void* stream = nullptr;
    if (api->current_stream && api->current_stream(t.device().type, t.device().id, &stream) != 0)
      throw py::error_already_set();
    this->stream = static_cast<cudaStream_t>(stream);
  }
  ~Launch() {
    if (changed_) cudaSetDevice(before_);
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;
  void done(cudaError_t error) const { check(error, op_); }
  cudaStream_t stream;

 private:
  const char* op_;
  int before_ = 0;
  bool changed_ = false;
};

void* pointer(const TensorView& t) { return t.defined() ? t.data() : nullptr; }

// None, or exactly these sizes, contiguous in the last dimension (throughout, when `whole`).
void expect(const char* op, const char* name, const TensorView& t, std::initializer_list<int64_t> sizes, DType dtype,
            bool whole) {
  if (!t.defined()) return;
  check_tensor(op, name, t, sizes, dtype);
  if (t.numel() == 0) return;
  if (!whole) return check_inner(op, name, t);
  int64_t stride = 1;
  for (int axis = t.ndim() - 1; axis >= 0; stride *= t.size(axis--))
    if (t.size(axis) > 1 && t.stride(axis) != stride)
      fail(op, name, "a contiguous tensor", "stride " + std::to_string(t.stride(axis)));
}

void lstm_gates_forward(TensorView h, TensorView c, TensorView gates, TensorView cell, TensorView peephole) {
  const char* op = "lstm_gates";
  check_rank(op, "cell", cell, 2);
  check_float(op, "cell", cell);
  const int64_t batch = cell.size(0), hidden = cell.size(1);
  const DType dtype = cell.dtype();
  expect(op, "gates", gates, {batch, 4 * hidden}, dtype, false);
  expect(op, "cell", cell, {batch, hidden}, dtype, false);
  expect(op, "peephole", peephole, {3, hidden}, dtype, false);
  expect(op, "h", h, {batch, hidden}, dtype, true);
  expect(op, "c", c, {batch, hidden}, dtype, true);
  const Launch launch(op, cell);
  const LstmGatesArgs args{
      pointer(gates), pointer(cell), pointer(peephole), pointer(h),     pointer(c),
      batch,          hidden,        gates.stride(0),   cell.stride(0), peephole.defined() ? peephole.stride(0) : 0};
  py::gil_scoped_release release;
  launch.done(lstm_gates(args, dtype, launch.stream));
}

void lstm_gates_gradient(TensorView dgates, TensorView dcell, TensorView dpeephole, TensorView dh, TensorView dc,
                         TensorView gates, TensorView cell, TensorView peephole, TensorView scratch) {
  const char* op = "lstm_gates_backward";
  check_rank(op, "cell", cell, 2);
  check_float(op, "cell", cell);
  const int64_t batch = cell.size(0), hidden = cell.size(1);
  const DType dtype = cell.dtype();
  expect(op, "gates", gates, {batch, 4 * hidden}, dtype, false);
  expect(op, "cell", cell, {batch, hidden}, dtype, false);
  expect(op, "peephole", peephole, {3, hidden}, dtype, false);
  expect(op, "dh", dh, {batch, hidden}, dtype, false);
  expect(op, "dc", dc, {batch, hidden}, dtype, false);
  expect(op, "dgates", dgates, {batch, 4 * hidden}, dtype, true);
  expect(op, "dcell", dcell, {batch, hidden}, dtype, true);
  expect(op, "dpeephole", dpeephole, {3, hidden}, dtype, true);
  const int64_t needed = dpeephole.defined() ? lstm_gates_scratch(batch, hidden) : 0;
  MK_CHECK(needed == 0 || (scratch.defined() && scratch.numel() >= needed), op, "scratch", needed, describe(scratch));
  const Launch launch(op, cell);
  const LstmGatesBackwardArgs args{pointer(gates),
                                   pointer(cell),
                                   pointer(peephole),
                                   pointer(dh),
                                   pointer(dc),
                                   pointer(dgates),
                                   pointer(dcell),
                                   pointer(dpeephole),
                                   pointer(scratch),
                                   batch,
                                   hidden,
                                   gates.stride(0),
                                   cell.stride(0),
                                   peephole.defined() ? peephole.stride(0) : 0,
                                   dh.defined() ? dh.stride(0) : 0,
                                   dc.defined() ? dc.stride(0) : 0};
  py::gil_scoped_release release;
  launch.done(lstm_gates_backward(args, dtype, launch.stream));
}

MemoryWriteArgs memory_write_args(const char* op, const TensorView& memory, const TensorView& weights,
                                  const TensorView& erase, const TensorView& add) {
  check_rank(op, "memory", memory, 3);
  check_float(op, "memory", memory);
  check_rank(op, "weights", weights, 3);
  const int64_t batch = memory.size(0), rows = memory.size(1), width = memory.size(2), heads = weights.size(1);
  const DType dtype = memory.dtype();
  check_tensor(op, "weights", weights, {batch, heads, rows}, dtype);
  expect(op, "memory", memory, {batch, rows, width}, dtype, false);
  expect(op, "erase", erase, {batch, heads, width}, dtype, false);
  expect(op, "add", add, {batch, heads, width}, dtype, false);
  return {memory.data(),
          weights.data(),
          erase.data(),
          add.data(),
          batch,
          rows,
          width,
          heads,
          memory.stride(0),
          memory.stride(1),
          weights.stride(0),
          weights.stride(1),
          weights.stride(2),
          erase.stride(0),
          erase.stride(1),
          add.stride(0),
          add.stride(1)};
}

void memory_write_forward(TensorView written, TensorView memory, TensorView weights, TensorView erase, TensorView add) {
  const char* op = "memory_write";
  const MemoryWriteArgs args = memory_write_args(op, memory, weights, erase, add);
  expect(op, "written", written, {args.batch, args.rows, args.width}, memory.dtype(), true);
  const Launch launch(op, memory);
  py::gil_scoped_release release;
  launch.done(memory_write(args, written.data(), memory.dtype(), launch.stream));
}

void memory_write_gradient(TensorView dmemory, TensorView dweights, TensorView derase, TensorView dadd,
                           TensorView dwritten, TensorView memory, TensorView weights, TensorView erase, TensorView add,
                           TensorView scratch) {
  const char* op = "memory_write_backward";
  const MemoryWriteArgs args = memory_write_args(op, memory, weights, erase, add);
  const DType dtype = memory.dtype();
  check_rank(op, "dwritten", dwritten, 3);
  expect(op, "dwritten", dwritten, {args.batch, args.rows, args.width}, dtype, false);
  expect(op, "dmemory", dmemory, {args.batch, args.rows, args.width}, dtype, true);
  expect(op, "dweights", dweights, {args.batch, args.heads, args.rows}, dtype, true);
  expect(op, "derase", derase, {args.batch, args.heads, args.width}, dtype, true);
  expect(op, "dadd", dadd, {args.batch, args.heads, args.width}, dtype, true);
  const bool sums = derase.defined() || dadd.defined();
  const int64_t needed = sums ? memory_write_scratch(args.batch, args.rows, args.width, args.heads) : 0;
  MK_CHECK(needed == 0 || (scratch.defined() && scratch.numel() >= needed), op, "scratch", needed, describe(scratch));
  const Launch launch(op, memory);
  const MemoryWriteGradients gradients{dwritten.data(),   dwritten.stride(0), dwritten.stride(1), pointer(dmemory),
                                       pointer(dweights), pointer(derase),    pointer(dadd),      pointer(scratch)};
  py::gil_scoped_release release;
  launch.done(memory_write_backward(args, gradients, dtype, launch.stream));
}

template <class T = int64_t>
T* integers(const char* op, const char* name, const TensorView& t, int64_t n) {
  check_output(op, name, t, {n}, DType::int64);
  return static_cast<T*>(t.data());
}

int64_t store_buckets(const char* op, const TensorView& table) {
  check_rank(op, "table", table, 2);
  check_output(op, "table", table, {table.size(0), 8}, DType::int64);
  MK_CHECK(table.size(0) > 0, op, "table", "at least one bucket", describe(table));
  return table.size(0);
}

void find_in_store(TensorView rows, TensorView table, TensorView keys) {
  const char* op = "store_find";
  const int64_t n = keys.numel(), buckets = store_buckets(op, table);
  const auto* found = integers<const uint64_t>(op, "keys", keys, n);
  const Launch launch(op, table);
  launch.done(store_find(static_cast<const uint64_t*>(table.data()), buckets, found, integers(op, "rows", rows, n), n,
                         launch.stream));
}

void parts_of_store(TensorView parts, TensorView table, TensorView keys) {
  const char* op = "store_parts";
  const int64_t n = keys.numel(), buckets = store_buckets(op, table);
  const auto* found = integers<const uint64_t>(op, "keys", keys, n);
  const Launch launch(op, table);
  launch.done(store_parts(buckets, found, integers(op, "parts", parts, n), n, launch.stream));
}

// order and starts, or later: the elements that were left over come first in it.
StoreSlice store_slice(const char* op, const TensorView& table, const TensorView& keys, const TensorView& flags,
                       const TensorView& order, const TensorView& starts, const TensorView& later) {
  const int64_t n = keys.numel(), buckets = store_buckets(op, table);
  const int64_t parts = (buckets + 255) / 256;
  check_output(op, "flags", flags, {n}, DType::boolean);
  return {static_cast<uint64_t*>(table.data()),
          buckets,
          integers<const uint64_t>(op, "keys", keys, n),
          n,
          integers(op, "order", order, n),
          integers(op, "starts", starts, parts + 1),
          parts,
          static_cast<uint8_t*>(flags.data()),
          later.defined() ? integers(op, "later", later, n) : nullptr};
}

void upsert_in_store(TensorView table, TensorView keys, TensorView flags, TensorView order, TensorView starts,
                     TensorView later, TensorView rows, int mode, TensorView now, TensorView old, TensorView codes,
                     bool give_rows) {
  const char* op = "store_upsert_";
  const int64_t n = keys.numel();
  const StoreSlice slice = store_slice(op, table, keys, flags, order, starts, later);
  const StoreUpsert work{integers(op, "rows", rows, rows.numel()), mode, integers(op, "now", now, n),
                         integers(op, "old", old, n), integers(op, "codes", codes, n)};
  const Launch launch(op, table);
  launch.done(give_rows ? store_give_rows(slice, work, launch.stream) : store_upsert(slice, work, launch.stream));
}

void erase_in_store(TensorView table, TensorView keys, TensorView flags, TensorView order, TensorView starts,
                    TensorView later, TensorView removed, TensorView codes) {
  const char* op = "store_erase_";
  const int64_t n = keys.numel();
  const StoreSlice slice = store_slice(op, table, keys, flags, order, starts, later);
  const Launch launch(op, table);
  launch.done(store_erase(slice, integers(op, "removed", removed, n), integers(op, "codes", codes, n), launch.stream));
}

}  // namespace
}  // namespace mk::cuda

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of memkernels; tensors by the DLPack C exchange API.";
  m.def("bind", &mk::dlpack::bind_exchange, "Takes torch.Tensor.__dlpack_c_exchange_api__, once, at import.");
  m.def("lstm_gates", &mk::cuda::lstm_gates_forward);
  m.def("lstm_gates_backward", &mk::cuda::lstm_gates_gradient);
  m.def("lstm_gates_scratch", &mk::cuda::lstm_gates_scratch);
  m.def("memory_write", &mk::cuda::memory_write_forward);
  m.def("memory_write_backward", &mk::cuda::memory_write_gradient);
  m.def("memory_write_scratch", &mk::cuda::memory_write_scratch);
  m.def("store_find", &mk::cuda::find_in_store);
  m.def("store_parts", &mk::cuda::parts_of_store);
  m.def("store_upsert_", &mk::cuda::upsert_in_store);
  m.def("store_erase_", &mk::cuda::erase_in_store);
}
