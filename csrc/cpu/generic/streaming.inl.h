// Whether a gradient whose rows of T are written in whole vectors of A goes past the caches.
#pragma once
#include "common/caches.h"
#include "common/types.h"

namespace mk::cpu::MK_LEVEL {
namespace {

template <class A, class T>
MK_INLINE bool past_caches(const void* gradient, int64_t rows, int64_t width) {
  return sizeof(T) == sizeof(A) && width % Vec<A>::kLanes == 0 && uintptr_t(gradient) % 64 == 0 &&
         rows * width * int64_t(sizeof(T)) >= kPastCaches;
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
