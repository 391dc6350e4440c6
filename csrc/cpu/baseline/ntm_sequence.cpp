#include "cpu/baseline/vec.h"

#include "cpu/generic/ntm_sequence.inl.h"
