// dnc_sequence, host side: checks, the split into tiles of the batch, the Python binding.
#include "cpu/dnc_sequence.h"

#include <pybind11/stl.h>

#include <cmath>
#include <string>
#include <vector>

#include "common/arena.h"
#include "common/checks.h"
#include "common/pages.h"
#include "common/tasks.h"
#include "cpu/select.h"

namespace mk::cpu {
namespace {

constexpr const char* kOp = "dnc_sequence";
constexpr int64_t kWeightRows = 32;          // rows of the gradients of weights in a task
constexpr int64_t kMostTile = 8;             // batch rows that share the reads of the controller's weights
constexpr int64_t kTileBytes = 1024 * 1024;  // what the state of a tile may take of the L2 cache
enum Input {
  kInput,
  kMemory,
  kUsage,
  kLink,
  kPrecedence,
  kWrite,
  kRead,
  kReads,
  kH,
  kC,
  kWeights,
  kInputs = kWeights + 6
};
enum Output { kAllReads, kHidden, kLastMemory, kLastUsage, kLastLink, kLastPrecedence, kAllWeights, kLastCell, kSaved };
constexpr int kOutputs = kSaved + 7;

using Views = std::vector<InputView>;
using Tensors = std::vector<TensorView>;

// key_mask, sharpen_links, deallocate, write_gradient, bounded; strength is "oneplus"; the cosine; clip.
struct Options {
  std::vector<bool> flags;
  std::string strength, cosine;
  double clip;
};

DType wide(DType type) { return type == DType::float64 ? type : DType::float32; }
int64_t wide_size(DType type) { return type == DType::float64 ? 8 : 4; }

void set_options(DncArgs& a, const Options& o) {
  MK_CHECK(o.flags.size() == 5, kOp, "flags", 5, o.flags.size());
  a.key_mask = o.flags[0], a.sharpen_links = o.flags[1], a.deallocate = o.flags[2], a.write_gradient = o.flags[3];
  a.bounded = o.flags[4], a.oneplus = o.strength == "oneplus", a.clip = o.clip;
  a.cosine = o.cosine == "roots" ? DncCosine::roots
                                 : (o.cosine == "product" ? DncCosine::product : DncCosine::roots_and_product);
}

void set_controller(DncArgs& a, const Views& in, DType type) {
  const int64_t gates = 4 * a.hidden, h = a.hidden, p = a.asks();
  check_output(kOp, "reads", in[kReads], {a.batch, a.readers, a.width}, type);
  check_output(kOp, "hidden", in[kH], {a.batch, h}, type), check_output(kOp, "cell", in[kC], {a.batch, h}, type);
  check_output(kOp, "weight_ih", in[kWeights], {gates, a.features}, type);
  check_output(kOp, "weight_rh", in[kWeights + 1], {gates, a.readers, a.width}, type);
  check_output(kOp, "weight_hh", in[kWeights + 2], {gates, h}, type);
  check_output(kOp, "bias", in[kWeights + 3], {gates}, type);
  check_output(kOp, "weight_interface", in[kWeights + 4], {p, h}, type);
  check_output(kOp, "bias_interface", in[kWeights + 5], {p}, type);
  const void** to[] = {
      &a.reads, &a.h, &a.c, &a.weight_ih, &a.weight_rh, &a.weight_hh, &a.bias, &a.weight_interface, &a.bias_interface};
  for (int i = 0; i < kInputs - kReads; i++) *to[i] = in[kReads + i].data();
}

// Rows of the batch that go through the steps together: without a controller they share nothing.
int64_t tile_of(const DncArgs& a, DType type, bool backward) {
  if (!a.controlled) return 1;
  const int64_t memory = a.padded_rows() * a.width, link = a.writers * a.rows * a.rows;
  const int64_t row = (memory + link) * (backward ? a.segment + 2 : 1) * wide_size(type);
  const int64_t share = (a.batch + num_threads() - 1) / num_threads();
  return std::max<int64_t>(1, std::min({kMostTile, share, kTileBytes / std::max<int64_t>(row, 1)}));
}

DncArgs arguments(const Views& in, const Options& options, bool backward) {
  MK_CHECK(int(in.size()) == kInputs, kOp, "inputs", int(kInputs), in.size());
  DncArgs a{};
  const TensorView &input = in[kInput], &memory = in[kMemory], &read = in[kRead], &write = in[kWrite];
  check_rank(kOp, "input", input, 3), check_float(kOp, "input", input), check_inner(kOp, "input", input);
  check_rank(kOp, "memory", memory, 3), check_inner(kOp, "memory", memory);
  check_rank(kOp, "write_weights", write, 3), check_rank(kOp, "read_weights", read, 3);
  set_options(a, options);
  const DType type = input.dtype();
  a.controlled = in[kH].defined();
  a.steps = input.size(0), a.batch = input.size(1), a.features = input.size(2);
  a.rows = memory.size(1), a.width = memory.size(2), a.readers = read.size(1), a.writers = write.size(1);
  MK_CHECK(a.rows < int64_t(1) << 31, kOp, "memory", "fewer than 2^31 rows", a.rows);
  const int64_t n = a.rows, u = a.writers;
  check_tensor(kOp, "memory", memory, {a.batch, n, a.width}, type);
  check_output(kOp, "usage", in[kUsage], {a.batch, n}, type);
  check_output(kOp, "link", in[kLink], {a.batch, u, n, n}, type);
  check_output(kOp, "precedence", in[kPrecedence], {a.batch, u, n}, type);
  check_output(kOp, "write_weights", write, {a.batch, u, n}, type);
  check_output(kOp, "read_weights", read, {a.batch, a.readers, n}, type);
  if (a.controlled) {
    check_rank(kOp, "hidden", in[kH], 2);
    a.hidden = in[kH].size(1);
    set_controller(a, in, type);
  } else {
    MK_CHECK(a.features == a.asks(), kOp, "input", a.asks(), a.features);
  }
  a.input = input.data(), a.input_t = input.stride(0), a.input_b = input.stride(1);
  a.memory = memory.data(), a.memory_b = memory.stride(0), a.memory_n = memory.stride(1);
  a.usage = in[kUsage].data(), a.link = in[kLink].data(), a.precedence = in[kPrecedence].data();
  a.write_weights = write.data(), a.read_weights = read.data();
  // Half of sqrt(T): what lies within a segment stays in the cache, and there are about 2 sqrt(T) checkpoints.
  a.segment = std::max<int64_t>(1, int64_t(std::ceil(std::sqrt(double(a.steps)) / 2)));
  a.tile = tile_of(a, type, backward);
  return a;
}

// weights, asked, usages, precedences, followed, and with a controller rows, gates, cells.
void set_saved(DncArgs& a, DType type, const TensorView& weights, const TensorView* saved) {
  const DType acc = wide(type);
  const int64_t t = a.steps, b = a.batch, n = a.rows, r = a.readers, u = a.writers;
  check_output(kOp, "weights", weights, {t, b, a.every(), n}, acc);
  check_output(kOp, "asked", saved[0], {t, b, a.asks()}, acc), check_output(kOp, "usages", saved[1], {t, b, n}, acc);
  check_output(kOp, "precedences", saved[2], {t, b, u, n}, acc);
  check_output(kOp, "followed", saved[3], {t, b, 2, r, u, n}, acc);
  a.weights = weights.data(), a.asked = saved[0].data(), a.usages = saved[1].data();
  a.precedences = saved[2].data(), a.followed = saved[3].data();
  if (!a.controlled) return;
  check_output(kOp, "rows", saved[4], {t + 1, b, a.depth()}, acc);
  check_output(kOp, "gates", saved[5], {t, b, 4 * a.hidden}, acc);
  check_output(kOp, "cells", saved[6], {t, b, a.hidden}, acc);
  a.entered = saved[4].data(), a.gates = saved[5].data(), a.cells = saved[6].data();
}

// Packed weights, from scratch that outlives the call's kernels.
void take_packed(DncArgs& a, DType type, Scratch& scratch) {
  const auto take = [&](int64_t n) { return scratch.take<char>(n * wide_size(type)); };
  if (!a.controlled) return;
  a.controller = take(a.depth() * 4 * a.hidden), a.projection = take(a.hidden * a.asks());
  a.controller_bias = take(4 * a.hidden), a.projection_bias = take(a.asks());
}

// Runs kernel(a, first row, rows, scratch) on tiles of the batch. A row's bits do not depend on its tile.
template <class Kernel>
void for_each_tile(const DncArgs& a, int64_t scratch, const Kernel& kernel) {
  const int64_t tiles = (a.batch + a.tile - 1) / a.tile;
  const double step = double(a.rows) * double(a.writers * a.rows * (5 + 4 * a.readers) + 4 * a.every() * a.width + 200);
  const double controller = double(4 * a.hidden) * double(a.depth()) + double(a.hidden) * double(a.asks());
  const double flops = double(a.batch) * double(a.steps + 1) * (step + 2 * controller);
  run_tasks(tiles, flops, scratch, [&](int64_t task, char* room) {
    kernel(a, task * a.tile, std::min(a.tile, a.batch - task * a.tile), room);
  });
}

void forward(const Tensors& out, const Views& in, const std::vector<bool>& flags, const std::string& strength,
             const std::string& cosine, double clip) {
  DncArgs a = arguments(in, {flags, strength, cosine, clip}, false);
  const DType type = in[kInput].dtype();
  MK_CHECK(int(out.size()) == kOutputs, kOp, "outputs", kOutputs, out.size());
  const int64_t n = a.rows, u = a.writers;
  check_output(kOp, "all_reads", out[kAllReads], {a.steps, a.batch, a.readers, a.width}, type);
  check_output(kOp, "last_memory", out[kLastMemory], {a.batch, n, a.width}, type);
  check_output(kOp, "last_usage", out[kLastUsage], {a.batch, n}, type);
  check_output(kOp, "last_link", out[kLastLink], {a.batch, u, n, n}, type);
  check_output(kOp, "last_precedence", out[kLastPrecedence], {a.batch, u, n}, type);
  a.all_reads = out[kAllReads].data(), a.last_memory = out[kLastMemory].data(), a.last_usage = out[kLastUsage].data();
  a.last_link = out[kLastLink].data(), a.last_precedence = out[kLastPrecedence].data();
  if (a.controlled) {
    check_output(kOp, "all_hidden", out[kHidden], {a.steps, a.batch, a.hidden}, type);
    check_output(kOp, "last_cell", out[kLastCell], {a.batch, a.hidden}, type);
    a.all_hidden = out[kHidden].data(), a.last_cell = out[kLastCell].data();
  }
  set_saved(a, type, out[kAllWeights], out.data() + kSaved);
  const auto& kernels = select(dnc_sequence_levels);
  pybind11::gil_scoped_release nogil;
  for (int i = kAllWeights; i < kOutputs; i++)
    if (out[i].defined()) prefer_huge_pages(out[i].data(), out[i].numel() * wide_size(type));
  Scratch scratch;
  take_packed(a, type, scratch);
  kernels.pack[int(type)](a, false);
  for_each_tile(a, kernels.scratch[int(type)](a, false), kernels.forward[int(type)]);
}

void set_gradients(DncArgs& a, const Tensors& gradients, const Tensors& upstream, const Views& in) {
  const DType type = in[kInput].dtype();
  const int64_t t = a.steps, b = a.batch, n = a.rows, u = a.writers;
  const auto arrived = [&](int i, std::initializer_list<int64_t> sizes, DType of) -> const void* {
    if (!upstream[i].defined()) return nullptr;
    check_output(kOp, "a gradient", upstream[i], sizes, of);
    return upstream[i].data();
  };
  a.dreads = arrived(kAllReads, {t, b, a.readers, a.width}, type);
  a.dlast_memory = arrived(kLastMemory, {b, n, a.width}, type), a.dlast_usage = arrived(kLastUsage, {b, n}, type);
  a.dlast_link = arrived(kLastLink, {b, u, n, n}, type), a.dlast_precedence = arrived(kLastPrecedence, {b, u, n}, type);
  a.dweights = arrived(kAllWeights, {t, b, a.every(), n}, wide(type));
  if (a.controlled)
    a.dhidden = arrived(kHidden, {t, b, a.hidden}, type), a.dcell = arrived(kLastCell, {b, a.hidden}, type);
  void** to[] = {&a.dinput,         &a.dmemory,       &a.dusage,  &a.dlink, &a.dprecedence,
                 &a.dwrite_weights, &a.dread_weights, &a.dreads0, &a.dh,    &a.dc};
  for (int i = 0; i < kInputs; i++) {
    const TensorView& d = gradients[i];
    if (!d.defined()) continue;
    MK_CHECK(d.dtype() == type && d.numel() == in[i].numel(), kOp, "a gradient", describe(in[i]), describe(d));
    (i < kWeights ? *to[i] : a.dweight[i - kWeights]) = d.data();
  }
}

void backward(const Tensors& gradients, const Tensors& upstream, const Views& in, const Tensors& saved,
              const std::vector<bool>& flags, const std::string& strength, const std::string& cosine, double clip) {
  DncArgs a = arguments(in, {flags, strength, cosine, clip}, true);
  const DType type = in[kInput].dtype();
  MK_CHECK(saved.size() == 8 && int(upstream.size()) == kSaved && int(gradients.size()) == kInputs, kOp, "backward",
           "16, 8, 8 tensors", saved.size());
  set_saved(a, type, saved[0], saved.data() + 1);
  set_gradients(a, gradients, upstream, in);
  const auto& kernels = select(dnc_sequence_levels);
  pybind11::gil_scoped_release nogil;
  Scratch scratch;
  take_packed(a, type, scratch);
  if (a.controlled) {
    a.dgates = scratch.take<char>(a.steps * a.batch * 4 * a.hidden * wide_size(type));
    a.dasked = scratch.take<char>(a.steps * a.batch * a.asks() * wide_size(type));
  }
  kernels.pack[int(type)](a, true);
  for_each_tile(a, kernels.scratch[int(type)](a, true), kernels.backward[int(type)]);
  if (!a.controlled) return;
  const int64_t rows = 4 * a.hidden + a.asks(), tasks = (rows + kWeightRows - 1) / kWeightRows;
  const double flops = 2.0 * double(a.steps * a.batch) * double(rows) * double(a.depth() + 1);
  run_tasks(tasks, flops, (kWeightRows * (a.depth() + 18) + 64) * wide_size(type), [&](int64_t task, char* room) {
    const int64_t begin = task * kWeightRows;
    kernels.weights[int(type)](a, begin, std::min(begin + kWeightRows, rows), room);
  });
}

}  // namespace

void bind_dnc_sequence(pybind11::module_& m) {
  m.def("dnc_sequence", &forward);
  m.def("dnc_sequence_backward", &backward);
}

}  // namespace mk::cpu
