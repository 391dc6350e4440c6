#include "cpu/baseline/vec.h"

#include "cpu/generic/recurrent_table.inl.h"
