// What a level without an instruction for it does instead; avx512/compress.h has one.
#pragma once
#include "common/types.h"

namespace mk::cpu::MK_LEVEL {
namespace {

#if !MK_HAVE_COMPRESS
// Lanes that a mask holds.
MK_INLINE int64_t lanes_in(Vec<float>::Mask mask) {
  return int64_t(reduce_add(select(mask, Vec<float>::set1(1), Vec<float>::zero())));
}
MK_INLINE int64_t lanes_in(Vec<double>::Mask mask) {
  return int64_t(reduce_add(select(mask, Vec<double>::set1(1), Vec<double>::zero())));
}

// a + b in the lanes of the mask, a in the rest.
template <class T>
MK_INLINE Vec<T> add_in(typename Vec<T>::Mask mask, Vec<T> a, Vec<T> b) {
  return select(mask, a + b, a);
}

// The lanes of the mask go to `to`, whole vectors of which may be written; returns how many there are.
template <class T>
MK_INLINE int64_t compress(typename Vec<T>::Mask mask, Vec<T> v, T* to) {
  T lanes[Vec<T>::kLanes], kept[Vec<T>::kLanes];
  v.store(lanes);
  select(mask, Vec<T>::set1(T(1)), Vec<T>::zero()).store(kept);
  int64_t count = 0;
  for (int64_t l = 0; l < Vec<T>::kLanes; l++) {
    to[count] = lanes[l];
    count += kept[l] != T(0);
  }
  return count;
}
#endif

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
