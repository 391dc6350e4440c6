#include "cpu/generic/store_lookup.inl.h"
