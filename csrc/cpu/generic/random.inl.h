// Counter-based random numbers: a function of (seed, stream, step, row, unit) alone, so that masks are replayed instead
// of kept and are the same on every level, thread count and backend. mix is Wellons' lowbias32. An event happens where
// the high 24 bits of a unit's number are below `threshold`, round(probability * 2^24).
#pragma once
#include "common/types.h"

namespace mk::cpu::MK_LEVEL {
namespace {

enum class Stream : uint32_t { zoneout_h = 0, zoneout_c = 1, recurrent_dropout = 2 };

// Lanes of 32 bits in the compiler's vector extension: as many as a vector of the level has floats.
typedef uint32_t Words __attribute__((vector_size(4 * Vec<float>::kLanes)));

template <class U>
MK_INLINE U mix(U x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

constexpr uint32_t kGolden = 0x9e3779b9u;

MK_INLINE uint32_t random_row(uint64_t seed, Stream stream, int64_t t, int64_t b) {
  const uint32_t start = mix(mix(uint32_t(seed) ^ uint32_t(stream) * kGolden) ^ uint32_t(seed >> 32));
  return mix(mix(start + uint32_t(t)) + uint32_t(b) * 0x85ebca6bu);
}

// out[j] = `hit` where the event of unit j happens, else `miss`; writes whole vectors of floats past n.
template <class A>
void random_events(uint32_t row, uint32_t threshold, int64_t n, A hit, A miss, A* out) {
  constexpr int64_t kLanes = Vec<float>::kLanes;
  Words unit;
  for (int64_t l = 0; l < kLanes; l++) unit[l] = row + uint32_t(l + 1) * kGolden;
  for (int64_t j = 0; j < n; j += kLanes, unit += uint32_t(kLanes) * kGolden) {
    const Words bits = mix(unit) >> 8;
    for (int64_t l = 0; l < kLanes; l++) out[j + l] = bits[l] < threshold ? hit : miss;
  }
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
