#include "cpu/amx/vec.h"

#include "cpu/generic/lstm_table.inl.h"
