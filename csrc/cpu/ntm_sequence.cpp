// ntm_sequence, host side: checks, the split into tiles of the batch, the Python binding.
#include "cpu/ntm_sequence.h"

#include <pybind11/stl.h>

#include <vector>

#include "common/arena.h"
#include "common/checks.h"
#include "common/pages.h"
#include "common/tasks.h"
#include "cpu/select.h"

namespace mk::cpu {
namespace {

constexpr const char* kOp = "ntm_sequence";
constexpr int64_t kWeightRows = 32;  // rows of the gradients of weights in a task
enum Input { kInput, kMemory, kReadWeights, kWriteWeights, kReads, kH, kC, kWeights, kInputs = kWeights + 9 };
enum Output { kHidden, kAllReads, kLastMemory, kAllWeights, kLastCell, kEntered, kGates, kCells, kHeads, kOutputs };

using Views = std::vector<InputView>;

void check_contiguous(const char* name, const TensorView& t, std::initializer_list<int64_t> sizes, DType type) {
  check_output(kOp, name, t, sizes, type);
}

NtmArgs arguments(const Views& in, bool graves) {
  MK_CHECK(int(in.size()) == kInputs, kOp, "inputs", int(kInputs), in.size());
  NtmArgs a{};
  const TensorView &input = in[kInput], &memory = in[kMemory], &key = in[kWeights + 4], &scalars = in[kWeights + 5];
  check_rank(kOp, "input", input, 3), check_float(kOp, "input", input), check_inner(kOp, "input", input);
  check_rank(kOp, "memory", memory, 3), check_inner(kOp, "memory", memory);
  check_rank(kOp, "hidden", in[kH], 2), check_rank(kOp, "read_key", key, 3),
      check_rank(kOp, "read_scalars", scalars, 3);
  check_rank(kOp, "write_weights", in[kWriteWeights], 3);
  const DType type = input.dtype();
  a.graves = graves;
  a.steps = input.size(0), a.batch = input.size(1), a.features = input.size(2), a.hidden = in[kH].size(1);
  a.rows = memory.size(1), a.width = memory.size(2), a.readers = key.size(0), a.writers = in[kWriteWeights].size(1);
  a.scalars = scalars.size(1);
  const int64_t r = a.readers, u = a.writers, w = a.width, h = a.hidden, gates = 4 * h;
  check_tensor(kOp, "memory", memory, {a.batch, a.rows, w}, type);
  check_contiguous("read_weights", in[kReadWeights], {a.batch, r, a.rows}, type);
  check_contiguous("write_weights", in[kWriteWeights], {a.batch, u, a.rows}, type);
  check_contiguous("reads", in[kReads], {a.batch, r, w}, type);
  check_contiguous("hidden", in[kH], {a.batch, h}, type), check_contiguous("cell", in[kC], {a.batch, h}, type);
  check_contiguous("weight_ih", in[kWeights], {gates, a.features}, type);
  check_contiguous("weight_rh", in[kWeights + 1], {gates, r, w}, type);
  check_contiguous("weight_hh", in[kWeights + 2], {gates, h}, type);
  check_contiguous("bias", in[kWeights + 3], {gates}, type);
  check_contiguous("read_key", key, {r, w, h + 1}, type);
  check_contiguous("read_scalars", scalars, {r, a.scalars, h + 1}, type);
  check_contiguous("write_key", in[kWeights + 6], {u, w, h + 1}, type);
  check_contiguous("write_scalars", in[kWeights + 7], {u, a.scalars, h + 1}, type);
  check_contiguous("write_vectors", in[kWeights + 8], {2, u, w, h + 1}, type);
  a.input = input.data(), a.input_t = input.stride(0), a.input_b = input.stride(1);
  a.memory = memory.data(), a.memory_b = memory.stride(0), a.memory_n = memory.stride(1);
  const void** rest[] = {&a.read_weights,
                         &a.write_weights,
                         &a.reads,
                         &a.h,
                         &a.c,
                         &a.weight_ih,
                         &a.weight_rh,
                         &a.weight_hh,
                         &a.bias,
                         &a.read_key,
                         &a.read_scalars,
                         &a.write_key,
                         &a.write_scalars,
                         &a.write_vectors};
  for (int i = 0; i < kInputs - kReadWeights; i++) *rest[i] = in[kReadWeights + i].data();
  return a;
}

DType wide(DType type) { return type == DType::float64 ? type : DType::float32; }
int64_t wide_size(DType type) { return type == DType::float64 ? 8 : 4; }

// weights, entered, gates, cells, heads.
void set_saved(NtmArgs& a, DType type, const TensorView* saved) {
  const DType acc = wide(type);
  check_contiguous("weights", saved[0], {a.steps, a.batch, a.every(), a.rows}, acc);
  check_contiguous("rows", saved[1], {a.steps + 1, a.batch, a.depth()}, acc);
  check_contiguous("gates", saved[2], {a.steps, a.batch, 4 * a.hidden}, acc);
  check_contiguous("cells", saved[3], {a.steps, a.batch, a.hidden}, acc);
  check_contiguous("heads", saved[4], {a.steps, a.batch, a.head_row()}, acc);
  void** to[] = {&a.weights, &a.entered, &a.gates, &a.cells, &a.heads};
  for (int i = 0; i < 5; i++) *to[i] = saved[i].data();
}

// Packed weights, from scratch that outlives the call's kernels.
void take_packed(NtmArgs& a, DType type, Scratch& scratch) {
  const auto take = [&](int64_t n) { return scratch.take<char>(n * wide_size(type)); };
  a.controller = take(a.depth() * 4 * a.hidden), a.projection = take(a.hidden * a.projected());
  a.controller_bias = take(4 * a.hidden), a.projection_bias = take(a.projected());
}

// Runs kernel(a, first row, rows, scratch) on tiles of the batch. A row's bits do not depend on its tile.
template <class Kernel>
void for_each_tile(const NtmArgs& a, DType type, bool backward, const NtmKernels& kernels, const Kernel& kernel) {
  const int64_t share = (a.batch + num_threads() - 1) / num_threads();
  const int64_t tile = std::max<int64_t>(1, std::min<int64_t>(kNtmTile, share)), tiles = (a.batch + tile - 1) / tile;
  const double flops = double(a.batch) * double(a.steps + 1) *
                       double(4 * a.hidden * a.depth() + a.hidden * a.projected() + a.rows * (4 * a.width + 60)) * 2;
  run_tasks(tiles, flops, kernels.scratch(a, backward) * wide_size(type),
            [&](int64_t task, char* room) { kernel(a, task * tile, std::min(tile, a.batch - task * tile), room); });
}

void forward(const std::vector<TensorView>& out, const Views& in, bool graves) {
  NtmArgs a = arguments(in, graves);
  const DType type = in[kInput].dtype();
  MK_CHECK(int(out.size()) == kOutputs, kOp, "outputs", int(kOutputs), out.size());
  check_contiguous("all_hidden", out[kHidden], {a.steps, a.batch, a.hidden}, type);
  check_contiguous("all_reads", out[kAllReads], {a.steps, a.batch, a.readers, a.width}, type);
  check_contiguous("last_memory", out[kLastMemory], {a.batch, a.rows, a.width}, type);
  check_contiguous("last_cell", out[kLastCell], {a.batch, a.hidden}, type);
  a.all_hidden = out[kHidden].data(), a.all_reads = out[kAllReads].data();
  a.last_memory = out[kLastMemory].data(), a.last_cell = out[kLastCell].data();
  const TensorView saved[] = {out[kAllWeights], out[kEntered], out[kGates], out[kCells], out[kHeads]};
  set_saved(a, type, saved);
  const auto& kernels = select(ntm_sequence_levels);
  pybind11::gil_scoped_release nogil;
  for (const TensorView& t : saved) prefer_huge_pages(t.data(), t.numel() * wide_size(type));
  Scratch scratch;
  take_packed(a, type, scratch);
  kernels.pack[int(type)](a, false);
  for_each_tile(a, type, false, kernels, kernels.forward[int(type)]);
}

void backward(const std::vector<TensorView>& gradients, const std::vector<TensorView>& upstream, const Views& in,
              const std::vector<TensorView>& saved, bool graves) {
  NtmArgs a = arguments(in, graves);
  const DType type = in[kInput].dtype();
  MK_CHECK(saved.size() == 5 && upstream.size() == 5 && int(gradients.size()) == kInputs, kOp, "backward",
           "5, 5, 16 tensors", saved.size());
  set_saved(a, type, saved.data());
  const auto arrived = [&](int i, std::initializer_list<int64_t> sizes, DType of) -> const void* {
    if (!upstream[i].defined()) return nullptr;
    check_contiguous("a gradient", upstream[i], sizes, of);
    return upstream[i].data();
  };
  a.dhidden = arrived(0, {a.steps, a.batch, a.hidden}, type);
  a.dreads = arrived(1, {a.steps, a.batch, a.readers, a.width}, type);
  a.dlast_memory = arrived(2, {a.batch, a.rows, a.width}, type);
  a.dweights = arrived(3, {a.steps, a.batch, a.every(), a.rows}, wide(type));
  a.dcell = arrived(4, {a.batch, a.hidden}, type);
  void** to[] = {&a.dinput, &a.dmemory, &a.dread_weights, &a.dwrite_weights, &a.dreads0, &a.dh, &a.dc};
  for (int i = 0; i < kInputs; i++) {
    const TensorView& d = gradients[i];
    if (!d.defined()) continue;
    MK_CHECK(d.dtype() == type && d.numel() == in[i].numel(), kOp, "a gradient", describe(in[i]), describe(d));
    (i < kWeights ? *to[i] : a.dweight[i - kWeights]) = d.data();
  }
  const auto& kernels = select(ntm_sequence_levels);
  pybind11::gil_scoped_release nogil;
  Scratch scratch;
  take_packed(a, type, scratch);
  a.dgates = scratch.take<char>(a.steps * a.batch * 4 * a.hidden * wide_size(type));
  a.dheads = scratch.take<char>(a.steps * a.batch * a.head_row() * wide_size(type));
  kernels.pack[int(type)](a, true);
  for_each_tile(a, type, true, kernels, kernels.backward[int(type)]);
  const int64_t rows = 4 * a.hidden + a.projected(), tasks = (rows + kWeightRows - 1) / kWeightRows;
  const double flops = 2.0 * double(a.steps * a.batch) * double(rows) * double(a.depth() + 1);
  run_tasks(tasks, flops, (kWeightRows * (a.depth() + 18) + 64) * wide_size(type), [&](int64_t task, char* room) {
    const int64_t begin = task * kWeightRows;
    kernels.weights[int(type)](a, begin, std::min(begin + kWeightRows, rows), room);
  });
}

}  // namespace

void bind_ntm_sequence(pybind11::module_& m) {
  m.def("ntm_sequence", &forward);
  m.def("ntm_sequence_backward", &backward);
}

}  // namespace mk::cpu
