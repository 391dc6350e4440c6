// crc32c: SSE4.2's instruction where the level has it, eight tables elsewhere. The instruction takes three cycles and
// one can start in every cycle, so long inputs go through it as three streams, whose checksums are joined by tables
// that append zeros.
#include <array>
#include <cstring>
#if defined(__SSE4_2__)
#include <nmmintrin.h>
#endif

#include "cpu/crc32c.h"

namespace mk::cpu::MK_LEVEL {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78u;  // reflected: bit 31 is x^0

#if defined(__SSE4_2__)

constexpr uint32_t multiply(uint32_t a, uint32_t b) {  // modulo the polynomial
  uint32_t product = 0;
  for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
    if (a & bit) product ^= b;
    b = (b >> 1) ^ (b & 1 ? kPolynomial : 0);
  }
  return product;
}

// Appends `Bytes` zero bytes to what a checksum was taken of.
template <size_t Bytes>
struct Zeros {
  std::array<std::array<uint32_t, 256>, 4> table{};
  Zeros() {
    uint32_t power = 1u << 31, square = 1u << 30;  // x^0, x^1
    for (size_t bits = 8 * Bytes; bits; bits >>= 1, square = multiply(square, square))
      if (bits & 1) power = multiply(power, square);
    for (int part = 0; part < 4; part++)
      for (uint32_t byte = 0; byte < 256; byte++) table[part][byte] = multiply(power, byte << (8 * part));
  }
  uint32_t operator()(uint32_t crc) const {
    return table[0][crc & 255] ^ table[1][crc >> 8 & 255] ^ table[2][crc >> 16 & 255] ^ table[3][crc >> 24];
  }
};

inline uint64_t word(const unsigned char* at) {
  uint64_t out;
  std::memcpy(&out, at, 8);
  return out;
}

template <size_t Bytes>
void three_streams(uint64_t& crc, const unsigned char*& data, size_t& n) {
  static const Zeros<Bytes> zeros;
  for (; n >= 3 * Bytes; data += 3 * Bytes, n -= 3 * Bytes) {
    uint64_t second = 0, third = 0;
    for (size_t i = 0; i < Bytes; i += 8) {
      crc = _mm_crc32_u64(crc, word(data + i));
      second = _mm_crc32_u64(second, word(data + Bytes + i));
      third = _mm_crc32_u64(third, word(data + 2 * Bytes + i));
    }
    crc = zeros(zeros(uint32_t(crc)) ^ uint32_t(second)) ^ third;
  }
}

uint32_t extend(uint32_t start, const unsigned char* data, size_t n) {
  uint64_t crc = ~start;
  three_streams<4096>(crc, data, n);
  three_streams<256>(crc, data, n);
  for (; n >= 8; data += 8, n -= 8) crc = _mm_crc32_u64(crc, word(data));
  for (; n; data++, n--) crc = _mm_crc32_u8(uint32_t(crc), *data);
  return ~uint32_t(crc);
}

#else

struct Tables {
  std::array<std::array<uint32_t, 256>, 8> at{};
  Tables() {
    for (uint32_t byte = 0; byte < 256; byte++) {
      uint32_t crc = byte;
      for (int bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ (crc & 1 ? kPolynomial : 0);
      at[0][byte] = crc;
    }
    for (int k = 1; k < 8; k++)
      for (uint32_t byte = 0; byte < 256; byte++) at[k][byte] = at[0][at[k - 1][byte] & 255] ^ (at[k - 1][byte] >> 8);
  }
};

uint32_t extend(uint32_t start, const unsigned char* data, size_t n) {
  static const Tables tables;
  const auto& at = tables.at;
  uint32_t crc = ~start;
  for (; n >= 8; data += 8, n -= 8) {
    const uint32_t low = crc ^ (data[0] | data[1] << 8 | data[2] << 16 | uint32_t(data[3]) << 24);
    crc = at[7][low & 255] ^ at[6][low >> 8 & 255] ^ at[5][low >> 16 & 255] ^ at[4][low >> 24] ^ at[3][data[4]] ^
          at[2][data[5]] ^ at[1][data[6]] ^ at[0][data[7]];
  }
  for (; n; data++, n--) crc = at[0][(crc ^ *data) & 255] ^ (crc >> 8);
  return ~crc;
}

#endif

}  // namespace

const Crc32cKernels crc32c = {extend};

}  // namespace mk::cpu::MK_LEVEL
