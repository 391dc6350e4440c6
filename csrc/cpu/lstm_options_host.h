// lstm with options, host side: what its files share. Never included by ISA-specific files.
#pragma once
#include <pybind11/stl.h>

#include "cpu/recurrent_host.h"
#include "cpu/lstm_options.h"
#include "cpu/select.h"

namespace mk::cpu {

// The tensors of a call, in the order of the op; those it has not are undefined.
enum LstmInput : int {
  kInput,
  kH0,
  kC0,
  kWeightIh,
  kWeightHh,
  kBiasIh,
  kBiasHh,
  kWeightHr,
  kPeephole,
  kNormWeight,
  kNormBias,
  kWeightCo,
  kReset,
  kResetH,
  kResetC,
  kLengths,
  kSeed,
  kLstmInputs
};
using LstmInputs = std::vector<InputView>;

struct LstmNumbers {
  bool reverse;
  int64_t heads;
  double zoneout_h, zoneout_c, dropout;
  bool expected;
};

constexpr const char* kLstm = "lstm";

// Checks the inputs and enters what forward and backward share.
void take_inputs(LstmOptions& f, const LstmInputs& in, const LstmNumbers& numbers);
// The scratch that forward and backward share; `leading` sizes and the weights to be packed are then known.
void plan_options(LstmOptions& f, const LstmOptionsKernels& kernels, int dtype, Scratch& scratch);
void plan_product(Product& product, const LstmOptionsKernels& kernels, int dtype, Scratch& scratch);
void lstm_options_backward(const std::vector<TensorView>& gradients, const LstmInputs& upstream, const LstmInputs& in,
                           const std::vector<TensorView>& saved, const LstmNumbers& numbers);

inline void check_rows(const char* name, const TensorView& t, std::initializer_list<int64_t> sizes, DType type) {
  check_tensor(kLstm, name, t, sizes, type);
  check_inner(kLstm, name, t);
}
inline void* data_of(const TensorView& t) { return t.defined() ? t.data() : nullptr; }
inline int64_t sum_bytes(int dtype) { return dtype == int(DType::float64) ? 8 : 4; }

// Steps of chunk i in running order, as a span of t.
inline Span steps_of(const SteppedRows& rows, int64_t steps, int64_t i, bool backwards) {
  const int64_t begin = i * steps, end = std::min(begin + steps, rows.T);
  return backwards ? Span{rows.T - end, rows.T - begin} : Span{begin, end};
}

// Ranks that pay: a barrier costs a few hundred nanoseconds, so a step must be longer than that by far.
inline int ranks_of(const LstmOptions& f) {
  constexpr int64_t kStepFlops = 100000;
  return int(std::clamp<int64_t>(8 * f.rows.B * f.H * f.P / kStepFlops, 1, num_threads()));
}

// One rank of a team, and its shares of work.
struct LstmTeam {
  const LstmOptionsKernels& kernels;
  int dtype, rank, size;
  Barrier& barrier;

  Span share(int64_t n) const { return mk::cpu::share(n, rank, size); }
  void wait() const { barrier.wait(); }
  void pack(const Product& p) const {
    if (p.used) kernels.pack[dtype](p, share(panels_of(p, kernels.lanes[dtype])));
  }
  void multiply(const Product& p, const void* a, int64_t lda, int64_t rows, void* c, int64_t ldc) const {
    const int64_t tiles = tiles_of(rows, kernels.row_tile[dtype]);
    kernels.product[dtype](p, a, lda, rows, c, ldc, share(panels_of(p, kernels.lanes[dtype]) * tiles));
  }
  // Element (row, column) of scratch.
  void* at(void* base, int64_t row, int64_t ld, int64_t column = 0) const {
    return static_cast<char*>(base) + (row * ld + column) * sum_bytes(dtype);
  }
  // Weights, parameters and masks, before the first step.
  void prepare(const LstmOptions& f) const {
    for (const Product* p : {&f.input_to_gates, &f.hidden_to_gates, &f.cell_to_output, &f.project}) pack(*p);
    if (rank == 0) kernels.prepare[dtype](f);
    if (f.mask) kernels.draw[dtype](f, share(f.rows.B));
  }
};

}  // namespace mk::cpu
