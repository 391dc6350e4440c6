#include "cpu/baseline/vec.h"

#include "cpu/generic/attention.inl.h"
