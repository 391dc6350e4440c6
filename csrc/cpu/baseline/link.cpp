#include "cpu/baseline/vec.h"

#include "cpu/generic/link.inl.h"
