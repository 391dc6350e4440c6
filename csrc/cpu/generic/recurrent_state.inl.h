// States that enter and leave steps, and what a row of a step back reads and writes; a cell sees nothing else.
#pragma once
#include "cpu/recurrent.h"

namespace mk::cpu::MK_LEVEL {
namespace {

template <class T>
MK_INLINE T* element(void* base, int64_t offset) {
  return static_cast<T*>(base) + offset;
}
template <class T>
MK_INLINE const T* element(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}

// What enters the step of row r at line l instead of the state before it; null: zeros.
template <class T>
struct Entering {
  bool given;
  const T* state;
};
template <class T>
MK_INLINE Entering<T> entering(const RecurrentRows& rows, const GivenState& from, int64_t l, int64_t r, Slot s) {
  if (rows.resets(s))
    return {true, from.reset ? element<T>(from.reset, s.t * from.reset_t + s.b * from.reset_b) : nullptr};
  if (rows.starts(l, r)) return {true, element<T>(from.initial, s.b * from.initial_b)};
  return {false, nullptr};
}

// What one row of a step back reads and writes, from some unit on.
template <class T, class P>
struct GradientRow {
  const T *gates, *state, *old;  // old: the state that entered the step; null: zero
  const T *doutput, *dcells;     // may be null
  acc_t<T>*dh, *dc;              // gradients of the state after the step; a cell leaves those of the state before it
  P* dz;

  // The gradient of h.
  template <class Part>
  MK_INLINE Vec<acc_t<T>> arriving(int64_t at, Part part) const {
    using V = Vec<acc_t<T>>;
    const V flowing = V::load(dh + at);
    return doutput ? flowing + load<V>(doutput + at, part) : flowing;
  }
};

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
