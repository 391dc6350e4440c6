#include "cpu/avx2/vec.h"

#include "cpu/generic/weighted_bag.inl.h"
