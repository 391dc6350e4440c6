#include "cpu/baseline/vec.h"

#include "cpu/generic/content_backward.inl.h"
