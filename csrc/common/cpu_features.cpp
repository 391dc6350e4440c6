#include "common/cpu_features.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mk {
namespace {

const char* const kNames[] = {"baseline", "avx2", "avx512", "amx"};

#if defined(__x86_64__)
struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};
Registers cpuid(unsigned leaf, unsigned subleaf = 0) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
  return r;
}
bool bit(unsigned word, int index) { return word >> index & 1; }

// The register state the operating system saves at a context switch; without it the instructions fault.
unsigned long long saved_state() {
  if (!bit(cpuid(1).c, 27)) return 0;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (unsigned long long)high << 32 | low;
}

// Linux hands out the tile registers on request only; granted for the whole process and inherited by its threads.
bool request_tiles() {
#if defined(__linux__)
  constexpr int kArchReqXcompPerm = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) == 0;
#else
  return false;
#endif
}

Level detect() {
  const Registers one = cpuid(1), seven = cpuid(7), seven_one = cpuid(7, 1);
  const unsigned long long state = saved_state();
  const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6, tiles = (state & 0x60000) == 0x60000;
  if (!(ymm && bit(one.c, 12) && bit(one.c, 28) && bit(one.c, 29) && bit(seven.b, 5)))
    return Level::baseline;  // FMA AVX F16C AVX2
  const bool f = bit(seven.b, 16), dq = bit(seven.b, 17), bw = bit(seven.b, 30), vl = bit(seven.b, 31),
             bmi2 = bit(seven.b, 8);
  if (!(zmm && f && dq && bw && vl && bmi2)) return Level::avx2;
  const bool amx =
      bit(seven.d, 24) && bit(seven.d, 22) && bit(seven_one.a, 5) && bit(seven.c, 11);  // tile, bf16, avx512 bf16, vnni
#if MK_EMULATE_AMX                                                                      // cpu/amx/tiles.h
  return bit(seven_one.a, 5) && bit(seven.c, 11) ? Level::amx : Level::avx512;
#endif
  return tiles && amx && request_tiles() ? Level::amx : Level::avx512;
}
#else
Level detect() { return Level::baseline; }
#endif

Level best_level() {
  static const Level best = supported_levels().back();
  return best;
}

std::atomic<int> chosen{-1};

}  // namespace

const char* level_name(Level level) { return kNames[int(level)]; }

std::vector<Level> built_levels() {
  std::vector<Level> levels = {Level::baseline};
#if MK_HAVE_AVX2
  levels.push_back(Level::avx2);
#endif
#if MK_HAVE_AVX512
  levels.push_back(Level::avx512);
#endif
#if MK_HAVE_AMX
  levels.push_back(Level::amx);
#endif
  return levels;
}

std::vector<Level> supported_levels() {
  static const Level machine = detect();
  std::vector<Level> levels;
  for (Level level : built_levels())
    if (level <= machine) levels.push_back(level);
  return levels;
}

Level cpu_level() {
  const int level = chosen.load(std::memory_order_relaxed);
  return level < 0 ? best_level() : Level(level);
}

void set_cpu_level(const std::string& name) {
  std::string names;
  if (name == "auto") return chosen.store(-1);
  for (Level level : supported_levels()) {
    if (name == level_name(level)) return chosen.store(int(level));
    names += std::string(names.empty() ? "" : ", ") + level_name(level);
  }
  throw std::invalid_argument("cpu_level: level: expected one of " + names + " or auto on this machine, got " + name);
}

}  // namespace mk
