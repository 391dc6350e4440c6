#include "cpu/avx512/vec.h"

#include "cpu/generic/lstm_options.inl.h"
