// The element types of a tensor and how they round. Included by ISA-specific files, so every function is always_inline:
// no out-of-line copy compiled for a wide ISA may be left for the linker to merge into baseline code.
#pragma once
#include <cstdint>
#include <cstring>

#define MK_INLINE inline __attribute__((always_inline))

namespace mk {

template <class To, class From>
MK_INLINE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To out;
  std::memcpy(&out, &value, sizeof out);
  return out;
}

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// An element of an int8 row whose sums are kept in A.
template <class A>
struct signed8 {
  int8_t value;
};

template <class A>
MK_INLINE A to_float(signed8<A> x) {
  return A(x.value);
}
MK_INLINE float to_float(float x) { return x; }
MK_INLINE double to_float(double x) { return x; }
MK_INLINE float to_float(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

MK_INLINE float to_float(float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Multiplying by 2^112 moves the exponent bias and normalises denormals exactly.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f));
}

// Round to nearest, ties to even; NaN stays NaN (quiet), overflow goes to infinity.
MK_INLINE bfloat16 to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

MK_INLINE float16 to_float16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00 | (magnitude >> 13 & 0x3ff))};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
  if (magnitude < 0x38800000)  // denormal result: adding 0.5 lets the FPU round at 2^-24
    return {uint16_t(sign | (bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000))};
  return {uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13))};
}

template <class T>
struct convert;
template <>
struct convert<double> {
  static MK_INLINE double from(double x) { return x; }
};
template <>
struct convert<float> {
  static MK_INLINE float from(double x) { return float(x); }
};
template <>
struct convert<bfloat16> {
  static MK_INLINE bfloat16 from(float x) { return to_bfloat16(x); }
};
template <>
struct convert<float16> {
  static MK_INLINE float16 from(float x) { return to_float16(x); }
};

// What sums of T are kept in.
template <class T>
struct accumulate {
  using type = float;
};
template <>
struct accumulate<double> {
  using type = double;
};
template <class A>
struct accumulate<signed8<A>> {
  using type = A;
};
template <class T>
using acc_t = typename accumulate<T>::type;

// Kernel tables hold one entry a dtype, in this order.
enum class DType : int8_t {
  float64 = 0,
  float32 = 1,
  bfloat16 = 2,
  float16 = 3,
  boolean = 4,
  int64 = 5,
  int32 = 6,
  int8 = 7,
  other = 8
};
constexpr int kFloatTypes = 4;

}  // namespace mk

// {f<double>, f<float>, f<bfloat16>, f<float16>}: the row of a kernel table.
#define MK_FLOAT_TYPES(function) \
  { function<double>, function<float>, function<::mk::bfloat16>, function<::mk::float16> }
