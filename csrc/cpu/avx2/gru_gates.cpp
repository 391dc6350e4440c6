#include "cpu/avx2/vec.h"

#include "cpu/generic/gru_gates.inl.h"
