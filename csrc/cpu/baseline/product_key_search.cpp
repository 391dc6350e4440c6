#include "cpu/baseline/vec.h"

#include "cpu/generic/product_key_search.inl.h"
