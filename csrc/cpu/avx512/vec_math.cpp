#include "cpu/avx512/vec.h"

#include "cpu/generic/vec_math_test.inl.h"
