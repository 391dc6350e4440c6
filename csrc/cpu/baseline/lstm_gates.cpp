#include "cpu/baseline/vec.h"

#include "cpu/generic/lstm_gates.inl.h"
