// content_read and content_address, host side: checks, the split into tasks, the Python bindings.
#include "cpu/content.h"

#include "common/arena.h"
#include "common/checks.h"
#include "common/pages.h"
#include "common/parallel.h"
#include "cpu/select.h"

namespace mk::cpu {
namespace {

Similarity similarity_of(const char* op, const std::string& name) {
  if (name == "cosine") return Similarity::cosine;
  if (name == "dot") return Similarity::dot;
  MK_CHECK(name == "l2", op, "similarity", "cosine, dot or l2", name);
  return Similarity::l2;
}

struct Call {
  ContentArgs a{};
  const char* op;
  int dtype;
  DType type, wide;
  int64_t wide_size, chunk, chunks;
};

// Everything both directions share. A chunk is what one task owns: its size depends on nothing but the sizes of one
// batch entry.
Call prepare(const char* op, const TensorView& memory, const TensorView& key, const TensorView& strength,
             const TensorView& value, const TensorView& mask, const std::string& similarity) {
  Call call;
  ContentArgs& a = call.a;
  call.op = op;
  check_rank(op, "memory", memory, 3);
  call.dtype = check_float(op, "memory", memory);
  call.type = memory.dtype();
  call.wide = call.type == DType::float64 ? DType::float64 : DType::float32;
  call.wide_size = item_size(call.wide);
  check_inner(op, "memory", memory);
  a.batch = memory.size(0), a.rows = memory.size(1), a.width = memory.size(2);
  check_rank(op, "key", key, 3);
  a.heads = key.size(1);
  check_tensor(op, "key", key, {a.batch, a.heads, a.width}, call.type);
  check_inner(op, "key", key);
  check_tensor(op, "strength", strength, {a.batch, a.heads}, call.type);
  check_inner(op, "strength", strength);
  a.value_width = a.width;
  if (value.defined()) {
    check_rank(op, "value", value, 3);
    a.value_width = value.size(2);
    check_tensor(op, "value", value, {a.batch, a.rows, a.value_width}, call.type);
    check_inner(op, "value", value);
    a.value = value.data(), a.value_b = value.stride(0), a.value_n = value.stride(1);
  }
  if (mask.defined()) {
    check_tensor(op, "mask", mask, {a.batch, a.rows}, DType::boolean);
    check_inner(op, "mask", mask);
    a.mask = mask.data<bool>(), a.mask_b = mask.stride(0);
  }
  a.similarity = similarity_of(op, similarity);
  a.memory = memory.data(), a.memory_b = memory.stride(0), a.memory_n = memory.stride(1);
  a.key = key.data(), a.key_b = key.stride(0), a.key_r = key.stride(1);
  a.strength = strength.data(), a.strength_b = strength.stride(0);
  const int64_t row_bytes = (a.width + (a.value ? a.value_width : 0)) * item_size(call.type);
  a.tile = row_bytes <= 256 ? 64 : row_bytes <= 768 ? 32 : 16;  // two passes over a tile should meet it in the L1 cache
  call.chunk = std::max<int64_t>(512, 64 * ((a.heads + 3) / 4));
  call.chunks = (a.rows + call.chunk - 1) / call.chunk;
  return call;
}

// Runs body(b, chunk, first row, end row, scratch) for every chunk of every batch entry.
template <class Body>
void for_each_chunk(const Call& call, const Body& body) {
  const ContentArgs& a = call.a;
  const int64_t bytes = std::min(call.chunk, a.rows) * (a.width + a.value_width) * item_size(call.type);
  parallel_for(a.batch * call.chunks, grain_for(bytes * std::max<int64_t>(1, a.heads / 2)),
               [&](int64_t begin, int64_t end) {
                 Scratch scratch;
                 void* room = scratch.take<char>(content_scratch(a) * call.wide_size);
                 for (int64_t i = begin; i < end; i++) {
                   const int64_t b = i / call.chunks, c = i % call.chunks, first = c * call.chunk;
                   body(b, c, first, std::min(first + call.chunk, a.rows), room);
                 }
               });
}

void run_forward(Call& call, const TensorView& weights) {
  ContentArgs& a = call.a;
  const auto& kernels = select(content_levels);
  const int d = call.dtype;
  const int64_t slot = forward_partial(a) * call.wide_size;
  Scratch scratch;
  char* partials = scratch.take<char>(a.batch * call.chunks * slot);
  if (weights.defined()) {
    a.weights = weights.data();
    a.logits = call.type == call.wide ? a.weights : scratch.take<char>(a.batch * a.heads * a.rows * call.wide_size);
  }
  const bool one = call.chunks <= 1;
  for_each_chunk(call, [&](int64_t b, int64_t c, int64_t first, int64_t end, void* room) {
    kernels.forward[d](a, b, first, end, partials + (b * call.chunks + c) * slot, room);
    if (!one) return;
    kernels.combine[d](a, b, partials + b * slot, 1);
    if (a.weights) kernels.weigh[d](a, b, first, end);
  });
  if (one && call.chunks) return;
  parallel_for(a.batch, grain_for(call.chunks * slot), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) kernels.combine[d](a, b, partials + b * call.chunks * slot, call.chunks);
  });
  if (a.weights)
    for_each_chunk(call,
                   [&](int64_t b, int64_t, int64_t first, int64_t end, void*) { kernels.weigh[d](a, b, first, end); });
}

void run_backward(Call& call) {
  ContentArgs& a = call.a;
  const auto& kernels = select(content_levels);
  const int d = call.dtype;
  Scratch scratch;
  a.delta = scratch.take<char>(a.batch * a.heads * call.wide_size);
  char* centers = nullptr;
  const int64_t center_slot = a.heads * call.wide_size, slot = backward_partial(a) * call.wide_size;
  if (a.dweights) {
    centers = scratch.take<char>(a.batch * call.chunks * center_slot);
    for_each_chunk(call, [&](int64_t b, int64_t c, int64_t first, int64_t end, void* room) {
      kernels.center[d](a, b, first, end, centers + (b * call.chunks + c) * center_slot, room);
    });
  }
  for (int64_t b = 0; b < a.batch; b++)
    kernels.delta[d](a, b, centers ? centers + b * call.chunks * center_slot : nullptr, centers ? call.chunks : 0);
  const int64_t row_bytes = a.batch * a.rows * item_size(call.type);
  if (a.dmemory) prefer_huge_pages(a.dmemory, row_bytes * a.width);
  if (a.dvalue) prefer_huge_pages(a.dvalue, row_bytes * a.value_width);
  char* partials = scratch.take<char>(a.batch * call.chunks * slot);
  const bool one = call.chunks == 1;
  for_each_chunk(call, [&](int64_t b, int64_t c, int64_t first, int64_t end, void* room) {
    kernels.backward[d](a, b, first, end, partials + (b * call.chunks + c) * slot, room);
    if (one) kernels.backward_combine[d](a, b, partials + b * slot, 1);
  });
  if (one) return;
  parallel_for(a.batch, grain_for(call.chunks * slot), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++)
      kernels.backward_combine[d](a, b, partials + b * call.chunks * slot, call.chunks);
  });
}

void content_read(const TensorView& read, const TensorView& weights, const TensorView& stats, const TensorView& total,
                  const InputView& memory, const InputView& key, const InputView& strength, const InputView& value,
                  const InputView& mask, const std::string& similarity, bool return_weights) {
  Call call = prepare("content_read", memory, key, strength, value, mask, similarity);
  ContentArgs& a = call.a;
  check_output(call.op, "read", read, {a.batch, a.heads, a.value_width}, call.type);
  check_output(call.op, "stats", stats, {a.batch, a.heads, 2}, call.wide);
  check_output(call.op, "total", total, {a.batch, a.heads, a.value_width}, call.wide);
  if (return_weights) check_output(call.op, "weights", weights, {a.batch, a.heads, a.rows}, call.type);
  a.reads = true, a.read = read.data(), a.stats = stats.data(), a.total = total.data();
  pybind11::gil_scoped_release nogil;
  run_forward(call, return_weights ? weights : TensorView());
}

void content_address(const TensorView& weights, const TensorView& stats, const InputView& memory, const InputView& key,
                     const InputView& strength, const InputView& mask, const std::string& similarity) {
  Call call = prepare("content_address", memory, key, strength, TensorView(), mask, similarity);
  ContentArgs& a = call.a;
  check_output(call.op, "weights", weights, {a.batch, a.heads, a.rows}, call.type);
  check_output(call.op, "stats", stats, {a.batch, a.heads, 2}, call.wide);
  a.stats = stats.data();
  pybind11::gil_scoped_release nogil;
  run_forward(call, weights);
}

void set_gradients(Call& call, const TensorView& dmemory, const TensorView& dkey, const TensorView& dstrength,
                   const TensorView& dread, const TensorView& dweights, const TensorView& stats) {
  ContentArgs& a = call.a;
  const auto output = [&](const char* name, const TensorView& t, std::initializer_list<int64_t> sizes) -> void* {
    if (!t.defined()) return nullptr;
    check_output(call.op, name, t, sizes, call.type);
    return t.data();
  };
  a.dmemory = output("dmemory", dmemory, {a.batch, a.rows, a.width});
  a.dkey = output("dkey", dkey, {a.batch, a.heads, a.width});
  a.dstrength = output("dstrength", dstrength, {a.batch, a.heads});
  check_output(call.op, "stats", stats, {a.batch, a.heads, 2}, call.wide);
  a.stats = stats.data();
  if (dread.defined()) {
    check_tensor(call.op, "dread", dread, {a.batch, a.heads, a.value_width}, call.type);
    check_inner(call.op, "dread", dread);
    a.dread = dread.data(), a.dread_b = dread.stride(0), a.dread_r = dread.stride(1);
  }
  if (dweights.defined()) {
    check_tensor(call.op, "dweights", dweights, {a.batch, a.heads, a.rows}, call.type);
    check_inner(call.op, "dweights", dweights);
    a.dweights = dweights.data(), a.dweights_b = dweights.stride(0), a.dweights_r = dweights.stride(1);
  }
}

void content_read_backward(const TensorView& dmemory, const TensorView& dkey, const TensorView& dstrength,
                           const TensorView& dvalue, const InputView& dread, const InputView& dweights,
                           const InputView& memory, const InputView& key, const InputView& strength,
                           const InputView& value, const InputView& mask, const TensorView& stats,
                           const TensorView& total, const std::string& similarity) {
  Call call = prepare("content_read", memory, key, strength, value, mask, similarity);
  ContentArgs& a = call.a;
  set_gradients(call, dmemory, dkey, dstrength, dread, dweights, stats);
  check_output(call.op, "total", total, {a.batch, a.heads, a.value_width}, call.wide);
  if (dvalue.defined()) check_output(call.op, "dvalue", dvalue, {a.batch, a.rows, a.value_width}, call.type);
  a.reads = true, a.total = total.data(), a.dvalue = value.defined() && dvalue.defined() ? dvalue.data() : nullptr;
  pybind11::gil_scoped_release nogil;
  run_backward(call);
}

void content_address_backward(const TensorView& dmemory, const TensorView& dkey, const TensorView& dstrength,
                              const InputView& dweights, const InputView& memory, const InputView& key,
                              const InputView& strength, const InputView& mask, const TensorView& stats,
                              const std::string& similarity) {
  Call call = prepare("content_address", memory, key, strength, TensorView(), mask, similarity);
  set_gradients(call, dmemory, dkey, dstrength, TensorView(), dweights, stats);
  pybind11::gil_scoped_release nogil;
  run_backward(call);
}

}  // namespace

void bind_content(pybind11::module_& m) {
  m.def("content_read", &content_read);
  m.def("content_read_backward", &content_read_backward);
  m.def("content_address", &content_address);
  m.def("content_address_backward", &content_address_backward);
}

}  // namespace mk::cpu
