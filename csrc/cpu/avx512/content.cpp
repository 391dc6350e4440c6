#include "cpu/avx512/vec.h"

#include "cpu/generic/content_backward.inl.h"
