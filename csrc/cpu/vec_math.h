// The functions of vec_math.inl.h on whole arrays, for the tests of every level.
#pragma once
#include "cpu/kernels.h"

namespace mk::cpu {

enum class Function : int { copy, exp, log, sigmoid, tanh, sqrt, count };

struct VecMathKernels {
  void (*apply[kFloatTypes])(Function function, const void* x, void* out, int64_t n);
  void (*reduce[kFloatTypes])(const void* x, int64_t n, double* sum, double* largest);
};

MK_KERNELS(VecMathKernels, vec_math)

}  // namespace mk::cpu
