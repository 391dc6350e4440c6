#include "cpu/baseline/vec.h"

#include "cpu/generic/vec_math_test.inl.h"
