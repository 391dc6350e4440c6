// What a small call asks of torch before its kernel runs. In C++ because the same questions asked in Python take longer
// than the kernel.
#pragma once
#include <pybind11/pybind11.h>

namespace mk {

// call_kind, tensor_key, empty, empties, empty_gradients and integers_fit, as memkernels/_compat.py and _checks.py
// describe them, and bind_torch, which hands over what they use.
void bind_calls(pybind11::module_& m);

}  // namespace mk
