#include "cpu/avx2/vec.h"

#include "cpu/generic/lstm_options.inl.h"
