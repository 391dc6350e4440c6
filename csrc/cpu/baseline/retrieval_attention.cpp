#include "cpu/baseline/vec.h"

#include "cpu/generic/retrieval_attention.inl.h"
