#include "cpu/avx512/compress.h"

#include "cpu/generic/product_key_search.inl.h"
