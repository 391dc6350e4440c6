#include "cpu/amx/vec.h"

#include "cpu/generic/attention.inl.h"
