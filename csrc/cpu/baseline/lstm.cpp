#include "cpu/baseline/vec.h"

#include "cpu/generic/lstm_table.inl.h"
