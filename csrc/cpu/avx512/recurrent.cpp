#include "cpu/avx512/vec.h"

#include "cpu/generic/recurrent_table.inl.h"
