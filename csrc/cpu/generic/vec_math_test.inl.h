// vec_math: out[i] = function(x[i]), through load, function and store of one storage type; and the two reductions of a
// vector.
#include "cpu/vec_math.h"

namespace mk::cpu::MK_LEVEL {
namespace {

template <class S>
void vec_math_apply(Function function, const void* in, void* result, int64_t n) {
  using V = Vec<acc_t<S>>;
  const S* x = static_cast<const S*>(in);
  S* out = static_cast<S*>(result);
  const auto map = [&](auto f) {
    for_each_vec<V>(n, [&](int64_t i, auto part) { store(f(load<V>(x + i, part)), out + i, part); });
  };
  switch (function) {
    case Function::exp:
      return map([](V v) { return exp(v); });
    case Function::log:
      return map([](V v) { return log(v); });
    case Function::sigmoid:
      return map([](V v) { return sigmoid(v); });
    case Function::tanh:
      return map([](V v) { return tanh(v); });
    case Function::sqrt:
      return map([](V v) { return sqrt(v); });
    default:
      return map([](V v) { return v; });
  }
}

template <class S>
void vec_math_reduce(const void* in, int64_t n, double* sum, double* largest) {
  using V = Vec<acc_t<S>>;
  V total = V::zero(), top = V::set1(acc_t<S>(-__builtin_inf()));
  for_each_vec<V>(n, [&](int64_t i, auto part) {
    const V v = load<V>(static_cast<const S*>(in) + i, part);
    total = total + v;
    top = in_part(max(top, v), top, part);
  });
  *sum = reduce_add(total);
  *largest = reduce_max(top);
}

}  // namespace

const VecMathKernels vec_math = {MK_FLOAT_TYPES(vec_math_apply), MK_FLOAT_TYPES(vec_math_reduce)};

}  // namespace mk::cpu::MK_LEVEL
