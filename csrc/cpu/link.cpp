// link_step and link_read, host side: checks, the split into tasks, the Python bindings.
#include "cpu/link.h"

#include "common/checks.h"
#include "common/tasks.h"
#include "cpu/select.h"

namespace mk::cpu {
namespace {

LinkArgs arguments(const char* op, const TensorView& link, const TensorView& read) {
  check_rank(op, "link", link, 4);
  check_float(op, "link", link);
  check_rank(op, "read_weights", read, 3);
  LinkArgs a{};
  a.batch = link.size(0), a.heads = link.size(1), a.rows = link.size(2), a.read_heads = read.size(1);
  check_tensor(op, "link", link, {a.batch, a.heads, a.rows, a.rows}, link.dtype());
  check_inner(op, "link", link);
  check_tensor(op, "read_weights", read, {a.batch, a.read_heads, a.rows}, link.dtype());
  check_inner(op, "read_weights", read);
  a.link = link.data(), a.link_b = link.stride(0), a.link_h = link.stride(1), a.link_n = link.stride(2);
  a.read = read.data(), a.read_b = read.stride(0), a.read_r = read.stride(1);
  return a;
}

void set_update(LinkArgs& a, const char* op, const TensorView& precedence, const TensorView& write, DType type) {
  check_tensor(op, "precedence", precedence, {a.batch, a.heads, a.rows}, type);
  check_inner(op, "precedence", precedence);
  check_tensor(op, "write_weights", write, {a.batch, a.heads, a.rows}, type);
  check_inner(op, "write_weights", write);
  a.precedence = precedence.data(), a.precedence_b = precedence.stride(0), a.precedence_h = precedence.stride(1);
  a.write = write.data(), a.write_b = write.stride(0), a.write_h = write.stride(1);
  a.update = true;
}

// Upstream gradients of forward and backward, each there or not.
void set_directions(LinkArgs& a, const char* op, const TensorView& dforward, const TensorView& dbackward, DType type) {
  const auto checked = [&](const char* name, const TensorView& t) {
    if (!t.defined()) return false;
    check_tensor(op, name, t, {a.batch, a.read_heads, a.heads, a.rows}, type);
    check_inner(op, name, t);
    return true;
  };
  if (checked("dforward", dforward)) {
    a.dforward = dforward.data();
    a.dforward_b = dforward.stride(0), a.dforward_r = dforward.stride(1), a.dforward_h = dforward.stride(2);
  }
  if (checked("dbackward", dbackward)) {
    a.dbackward = dbackward.data();
    a.dbackward_b = dbackward.stride(0), a.dbackward_r = dbackward.stride(1), a.dbackward_h = dbackward.stride(2);
  }
}

// task(kernel arguments) for every chunk of every matrix, then combine(i, its partials) for all i below `combined`.
template <class Task, class Combine>
void run(const LinkArgs& a, DType type, bool back, int64_t combined, const Task& task, const Combine& combine) {
  const int64_t size = type == DType::float64 ? 8 : 4, matrices = a.batch * a.heads;
  const int64_t chunks = (a.rows + kLinkChunk - 1) / kLinkChunk, slot = link_partial(a, back) * size;
  const double flops =
      double(matrices) * double(a.rows) * double(a.rows) * (back ? 8.0 : 4.0) * double(a.read_heads + 2);
  Scratch scratch;
  char* partials = scratch.take<char>(matrices * chunks * slot);
  run_tasks(matrices * chunks, flops, link_scratch(a, back) * size, [&](int64_t i, char* room) {
    const int64_t first = i % chunks * kLinkChunk;
    task(i / chunks, first, std::min(first + kLinkChunk, a.rows), partials + i * slot, room);
  });
  parallel_for(combined, grain_for(matrices / std::max<int64_t>(combined, 1) * chunks * slot),
               [&](int64_t begin, int64_t end) {
                 const int64_t each = combined ? matrices / combined * chunks * slot : 0;
                 for (int64_t i = begin; i < end; i++) combine(i, partials + i * each, chunks);
               });
}

void run_forward(LinkArgs& a, const char* op, const TensorView& forward, const TensorView& backward, DType type) {
  a.forward = written(op, "forward", forward, {a.batch, a.read_heads, a.heads, a.rows}, type);
  a.backward = written(op, "backward", backward, {a.batch, a.read_heads, a.heads, a.rows}, type);
  const auto& kernels = select(link_levels);
  pybind11::gil_scoped_release nogil;
  run(
      a, type, false, a.batch * a.heads,
      [&](int64_t at, int64_t first, int64_t end, void* partial, void* room) {
        kernels.forward[int(type)](a, at, first, end, partial, room);
      },
      [&](int64_t at, const void* partials, int64_t chunks) {
        kernels.combine_forward[int(type)](a, at, partials, chunks);
      });
}

void run_backward(LinkArgs& a, const char* op, const TensorView& dlink, const TensorView& dread, DType type) {
  a.dlink = written(op, "dlink", dlink, {a.batch, a.heads, a.rows, a.rows}, type);
  a.dread = written(op, "dread_weights", dread, {a.batch, a.read_heads, a.rows}, type);
  const auto& kernels = select(link_levels);
  pybind11::gil_scoped_release nogil;
  run(
      a, type, true, a.batch,
      [&](int64_t at, int64_t first, int64_t end, void* partial, void* room) {
        kernels.backward[int(type)](a, at, first, end, partial, room);
      },
      [&](int64_t b, const void* partials, int64_t chunks) {
        kernels.combine_backward[int(type)](a, b, partials, chunks);
      });
}

void step(const TensorView& link_new, const TensorView& precedence_new, const TensorView& forward,
          const TensorView& backward, const InputView& link, const InputView& precedence, const InputView& write,
          const InputView& read) {
  constexpr const char* kOp = "link_step";
  LinkArgs a = arguments(kOp, link, read);
  const DType type = link.dtype();
  set_update(a, kOp, precedence, write, type);
  a.link_new = written(kOp, "new_link", link_new, {a.batch, a.heads, a.rows, a.rows}, type);
  a.precedence_new = written(kOp, "new_precedence", precedence_new, {a.batch, a.heads, a.rows}, type);
  run_forward(a, kOp, forward, backward, type);
}

void step_backward(const TensorView& dlink, const TensorView& dprecedence, const TensorView& dwrite,
                   const TensorView& dread, const InputView& dnew, const InputView& dprecedence_new,
                   const InputView& dforward, const InputView& dbackward, const InputView& link,
                   const InputView& precedence, const InputView& write, const InputView& read) {
  constexpr const char* kOp = "link_step";
  LinkArgs a = arguments(kOp, link, read);
  const DType type = link.dtype();
  set_update(a, kOp, precedence, write, type);
  set_directions(a, kOp, dforward, dbackward, type);
  if (dnew.defined()) {
    check_tensor(kOp, "dnew_link", dnew, {a.batch, a.heads, a.rows, a.rows}, type);
    check_inner(kOp, "dnew_link", dnew);
    a.dnew = dnew.data(), a.dnew_b = dnew.stride(0), a.dnew_h = dnew.stride(1), a.dnew_n = dnew.stride(2);
  }
  if (dprecedence_new.defined()) {
    check_tensor(kOp, "dnew_precedence", dprecedence_new, {a.batch, a.heads, a.rows}, type);
    check_inner(kOp, "dnew_precedence", dprecedence_new);
    a.dprecedence_new = dprecedence_new.data();
    a.dprecedence_b = dprecedence_new.stride(0), a.dprecedence_h = dprecedence_new.stride(1);
  }
  a.dprecedence = written(kOp, "dprecedence", dprecedence, {a.batch, a.heads, a.rows}, type);
  a.dwrite = written(kOp, "dwrite_weights", dwrite, {a.batch, a.heads, a.rows}, type);
  run_backward(a, kOp, dlink, dread, type);
}

void read_only(const TensorView& forward, const TensorView& backward, const InputView& link, const InputView& read) {
  LinkArgs a = arguments("link_read", link, read);
  run_forward(a, "link_read", forward, backward, link.dtype());
}

void read_only_backward(const TensorView& dlink, const TensorView& dread, const InputView& dforward,
                        const InputView& dbackward, const InputView& link, const InputView& read) {
  LinkArgs a = arguments("link_read", link, read);
  set_directions(a, "link_read", dforward, dbackward, link.dtype());
  run_backward(a, "link_read", dlink, dread, link.dtype());
}

}  // namespace

void bind_link(pybind11::module_& m) {
  m.def("link_step", &step);
  m.def("link_step_backward", &step_backward);
  m.def("link_read", &read_only);
  m.def("link_read_backward", &read_only_backward);
}

}  // namespace mk::cpu
