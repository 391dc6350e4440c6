// The checksum of the key-value store: CRC32C (Castagnoli), not an op of the package.
#pragma once
#include "cpu/kernels.h"

namespace mk::cpu {

struct Crc32cKernels {
  // The checksum of what gave `crc`, followed by these bytes.
  uint32_t (*extend)(uint32_t crc, const unsigned char* data, size_t n);
};

MK_KERNELS(Crc32cKernels, crc32c)

}  // namespace mk::cpu
