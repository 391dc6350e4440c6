#include "cpu/avx2/vec.h"

#include "cpu/generic/content_backward.inl.h"
