#include "cpu/avx2/vec.h"

#include "cpu/generic/attention.inl.h"
