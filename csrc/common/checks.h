// Argument checks of the host side: one sentence with op, argument, expected and got, thrown before anything is
// written.
#pragma once
#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/pages.h"
#include "common/tensor_view.h"

namespace mk {

template <class Expected, class Got>
[[noreturn]] void fail(const char* op, const char* argument, const Expected& expected, const Got& got) {
  std::ostringstream text;
  text << op << ": " << argument << ": expected " << expected << ", got " << got;
  throw std::invalid_argument(text.str());  // ValueError in Python
}

// "float32[2, 3]": how a tensor is named in messages.
inline std::string describe(const TensorView& t) {
  if (!t.defined()) return "None";
  std::ostringstream text;
  text << dtype_name(t.dtype()) << "[";
  for (int i = 0; i < t.ndim(); i++) text << (i ? ", " : "") << t.size(i);
  text << "]";
  return text.str();
}

// The tensor has exactly these sizes and this dtype.
inline void check_tensor(const char* op, const char* argument, const TensorView& t,
                         std::initializer_list<int64_t> sizes, DType dtype) {
  bool good = t.defined() && t.dtype() == dtype && t.ndim() == int(sizes.size());
  int axis = 0;
  if (good)
    for (int64_t size : sizes) good = good && t.size(axis++) == size;
  if (good) return;
  std::ostringstream expected;
  expected << dtype_name(dtype) << "[";
  axis = 0;
  for (int64_t size : sizes) expected << (axis++ ? ", " : "") << size;
  expected << "]";
  fail(op, argument, expected.str(), describe(t));
}

inline void check_rank(const char* op, const char* argument, const TensorView& t, int ndim) {
  if (!t.defined() || t.ndim() != ndim) fail(op, argument, std::to_string(ndim) + "-dimensional tensor", describe(t));
}

// One of the four element types; the return value indexes a kernel table.
inline int check_float(const char* op, const char* argument, const TensorView& t) {
  if (!t.defined() || int(t.dtype()) >= kFloatTypes)
    fail(op, argument, "float64, float32, bfloat16 or float16", describe(t));
  return int(t.dtype());
}

// Kernels read and write the last dimension as a run of memory.
inline void check_inner(const char* op, const char* argument, const TensorView& t) {
  const int last = t.ndim() - 1;
  if (t.size(last) > 1 && t.stride(last) != 1 && t.numel() > 0)
    fail(op, argument, "a contiguous last dimension", "stride " + std::to_string(t.stride(last)));
}

// An output as the registry allocates them: exact sizes, contiguous.
inline void check_output(const char* op, const char* argument, const TensorView& t,
                         std::initializer_list<int64_t> sizes, DType dtype) {
  check_tensor(op, argument, t, sizes, dtype);
  int64_t stride = 1;
  bool contiguous = true;
  for (int axis = t.ndim() - 1; axis >= 0; axis--) {
    contiguous = contiguous && (t.size(axis) <= 1 || t.stride(axis) == stride);
    stride *= t.size(axis);
  }
  if (!contiguous && t.numel() > 0) fail(op, argument, "a contiguous tensor", "a strided one");
}

// The memory of an output or gradient; null for one that nobody needs.
inline void* written(const char* op, const char* name, const TensorView& t, std::initializer_list<int64_t> sizes,
                     DType dtype) {
  if (!t.defined()) return nullptr;
  check_output(op, name, t, sizes, dtype);
  prefer_huge_pages(t.data(), t.numel() * item_size(dtype));
  return t.data();
}

}  // namespace mk

#define MK_CHECK(condition, op, argument, expected, got)       \
  do {                                                         \
    if (!(condition)) ::mk::fail(op, argument, expected, got); \
  } while (0)
