#include "cpu/baseline/vec.h"

#include "cpu/generic/weighted_bag.inl.h"
