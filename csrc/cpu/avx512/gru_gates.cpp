#include "cpu/avx512/vec.h"

#include "cpu/generic/gru_gates.inl.h"
