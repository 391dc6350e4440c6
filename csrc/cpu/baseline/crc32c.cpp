#include "cpu/generic/crc32c.inl.h"
