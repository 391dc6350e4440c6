// Which instruction sets may run: what the CPU has, what the system saves for us, and the level the user asked for.
#pragma once
#include <string>
#include <vector>

namespace mk {

enum class Level : int { baseline = 0, avx2 = 1, avx512 = 2, amx = 3 };

const char* level_name(Level level);
std::vector<Level> built_levels();      // compiled into this module
std::vector<Level> supported_levels();  // built, and this machine can run them
Level cpu_level();                      // the level in use: the best supported one, unless set
void set_cpu_level(
    const std::string& name);  // throws std::invalid_argument when it cannot run here; "auto" restores the best

}  // namespace mk
