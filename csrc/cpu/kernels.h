// The kernel tables of an op: one a level, the best built one at or below cpu_level() is used.
//
//   MK_KERNELS(MemoryReadKernels, memory_read)       in csrc/cpu/<op>.h, inside namespace mk::cpu
//   MK_KERNELS_AMX(...)                              instead, when csrc/cpu/amx/<op>.cpp exists
//   select(memory_read_levels).forward[dtype](...)   in csrc/cpu/<op>.cpp
#pragma once
#include "common/types.h"

namespace mk {
enum class Level : int;
}

namespace mk::cpu {
template <class Table>
struct Levels {
  const Table* tables[4];
};
}  // namespace mk::cpu

#if MK_HAVE_AVX2
#define MK_AVX2(name) &avx2::name
#else
#define MK_AVX2(name) nullptr
#endif
#if MK_HAVE_AVX512
#define MK_AVX512(name) &avx512::name
#else
#define MK_AVX512(name) nullptr
#endif
#if MK_HAVE_AMX
#define MK_AMX(name) &amx::name
#else
#define MK_AMX(name) nullptr
#endif

#define MK_DECLARE_TABLES(Table, name) \
  namespace baseline {                 \
  extern const Table name;             \
  }                                    \
  namespace avx2 {                     \
  extern const Table name;             \
  }                                    \
  namespace avx512 {                   \
  extern const Table name;             \
  }                                    \
  namespace amx {                      \
  extern const Table name;             \
  }
#define MK_KERNELS(Table, name)  \
  MK_DECLARE_TABLES(Table, name) \
  static constexpr Levels<Table> name##_levels{{&baseline::name, MK_AVX2(name), MK_AVX512(name), nullptr}};
#define MK_KERNELS_AMX(Table, name) \
  MK_DECLARE_TABLES(Table, name)    \
  static constexpr Levels<Table> name##_levels{{&baseline::name, MK_AVX2(name), MK_AVX512(name), MK_AMX(name)}};
