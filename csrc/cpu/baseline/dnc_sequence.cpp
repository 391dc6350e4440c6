#include "cpu/baseline/vec.h"

#include "cpu/generic/dnc_sequence.inl.h"
