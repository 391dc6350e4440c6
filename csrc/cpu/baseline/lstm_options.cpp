#include "cpu/baseline/vec.h"

#include "cpu/generic/lstm_options.inl.h"
