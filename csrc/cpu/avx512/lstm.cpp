#include "cpu/avx512/vec.h"

#include "cpu/generic/lstm_table.inl.h"
