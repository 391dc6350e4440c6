// The hashes of byte keys; memkernels/store/key_hash.py is the same.
#pragma once
#include <cstdint>
#include <cstring>

namespace mk::store {

// Up to eight bytes, little-endian; what is missing is zeros.
inline uint64_t word_of(const uint8_t* bytes, int64_t length) {
  uint64_t word = 0;
  if (length >= 8)
    std::memcpy(&word, bytes, 8);
  else
    for (int64_t k = 0; k < length; k++) word |= uint64_t(bytes[k]) << k * 8;
  return word;
}

struct KeyHash {
  uint64_t first, second;
};

// SipHash-1-3 of 128 bits (Aumasson, Bernstein, SIPHASH, 2012) under a fixed key, so that a table is the same on every
// run. Its state of 256 bits takes in a word by additions and rotations only; nobody knows how to make keys that agree
// in one half of the hash faster than by trying 2^32 of them, let alone many that do.
class SipHash {
 public:
  KeyHash operator()(const uint8_t* bytes, int64_t length) {
    int64_t i = 0;
    for (; i + 8 <= length; i += 8) take(word_of(bytes + i, 8));
    take(last_of(bytes, length) | uint64_t(length) << 56);
    c_ ^= 0xEE;
    const uint64_t first = finish();
    b_ ^= 0xDD;
    return {first, finish()};
  }

 private:
  // The bytes behind the last whole word. Most keys have one: its end and they are read at once, with no loop to
  // mispredict.
  static uint64_t last_of(const uint8_t* bytes, int64_t length) {
    const int left = int(length % 8);
    return length < 8 ? word_of(bytes, length) : word_of(bytes + length - 8, 8) >> (7 - left) * 8 >> 8;
  }

  static uint64_t turned(uint64_t x, int by) { return x << by | x >> (64 - by); }

  void mix() {
    a_ += b_, c_ += d_;
    b_ = turned(b_, 13) ^ a_, d_ = turned(d_, 16) ^ c_;
    a_ = turned(a_, 32);
    c_ += b_, a_ += d_;
    b_ = turned(b_, 17) ^ c_, d_ = turned(d_, 21) ^ a_;
    c_ = turned(c_, 32);
  }

  void take(uint64_t word) {
    d_ ^= word;
    mix();
    a_ ^= word;
  }

  uint64_t finish() {
    mix(), mix(), mix();
    return a_ ^ b_ ^ c_ ^ d_;
  }

  static constexpr uint64_t kKey0 = 0x9E3779B97F4A7C15ull, kKey1 = 0xC2B2AE3D27D4EB4Full;
  uint64_t a_ = kKey0 ^ 0x736F6D6570736575ull, b_ = kKey1 ^ 0x646F72616E646F6Dull ^ 0xEE;
  uint64_t c_ = kKey0 ^ 0x6C7967656E657261ull, d_ = kKey1 ^ 0x7465646279746573ull;
};

// 64 bits that say which rank of a sharded store owns a key: part of its format on disk. One bijection of the state a
// word of eight bytes.
inline uint64_t owner_hash(const uint8_t* bytes, int64_t length) {
  uint64_t state = uint64_t(length + 1) * 0x9E3779B97F4A7C15ull;
  for (int64_t i = 0; i < length; i += 8) {
    state = (state ^ word_of(bytes + i, length - i)) * 0xD6E8FEB86659FD93ull;
    state ^= state >> 32;
  }
  return state;
}

}  // namespace mk::store
