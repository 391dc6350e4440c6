#include "cpu/avx2/attention_vec.h"

#include "cpu/generic/product_key_search.inl.h"
