#include "cpu/avx2/vec.h"

#include "cpu/generic/recurrent_table.inl.h"
