// Host side only (never included by ISA-specific files).
#pragma once
#include "common/cpu_features.h"
#include "cpu/kernels.h"

namespace mk::cpu {

// The kernels of this level, or of the next one below that has some.
template <class Table>
const Table& select(const Levels<Table>& levels, int level = int(cpu_level())) {
  while (!levels.tables[level]) level--;  // the baseline is always there
  return *levels.tables[level];
}

}  // namespace mk::cpu
