// vec_math, host side: lets tests check the vector functions of each level. Not an op of the package.
#include "cpu/vec_math.h"

#include "common/checks.h"
#include "cpu/select.h"

namespace mk::cpu {
namespace {

void apply(const TensorView& out, const TensorView& x, const std::string& name) {
  static const char* const names[] = {"copy", "exp", "log", "sigmoid", "tanh", "sqrt"};
  int function = 0;
  while (function < int(Function::count) && name != names[function]) function++;
  MK_CHECK(function < int(Function::count), "vec_math", "function", "copy, exp, log, sigmoid, tanh or sqrt", name);
  const int dtype = check_float("vec_math", "x", x);
  check_rank("vec_math", "x", x, 1);
  check_output("vec_math", "out", out, {x.size(0)}, x.dtype());
  check_inner("vec_math", "x", x);
  select(vec_math_levels).apply[dtype](Function(function), x.data(), out.data(), x.size(0));
}

std::pair<double, double> reduce(const TensorView& x) {
  const int dtype = check_float("vec_math", "x", x);
  check_inner("vec_math", "x", x);
  std::pair<double, double> out;
  select(vec_math_levels).reduce[dtype](x.data(), x.numel(), &out.first, &out.second);
  return out;
}

}  // namespace

void bind_vec_math(pybind11::module_& m) {
  m.def("vec_math", &apply, pybind11::arg("out"), pybind11::arg("x"), pybind11::arg("function"));
  m.def("vec_reduce", &reduce, pybind11::arg("x"));
}

}  // namespace mk::cpu
