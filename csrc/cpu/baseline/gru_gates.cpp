#include "cpu/baseline/vec.h"

#include "cpu/generic/gru_gates.inl.h"
