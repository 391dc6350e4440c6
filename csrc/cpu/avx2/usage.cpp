#include "cpu/avx2/vec.h"

#include "cpu/generic/usage.inl.h"
