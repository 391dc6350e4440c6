#include "cpu/avx512/vec.h"

#include "cpu/generic/weighted_bag.inl.h"
