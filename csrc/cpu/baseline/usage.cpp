#include "cpu/baseline/vec.h"

#include "cpu/generic/usage.inl.h"
