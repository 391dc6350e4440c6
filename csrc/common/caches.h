// From how many bytes on what is written does not stay in the caches of two cores until it is read again: such stores
// go past them, for a plain one reads its line first and pushes another out.
#pragma once
#include <cstdint>

namespace mk {

constexpr int64_t kPastCaches = int64_t(4) << 20;

}  // namespace mk
