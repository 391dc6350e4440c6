// The tile instructions, or, in a build for tests on machines that have AVX512-BF16 but no AMX (MK_EMULATE_AMX), plain
// functions that do the same to the eight tile registers of a thread. Tiles are always whole: 16 rows of 64 bytes.
#pragma once
#include <immintrin.h>

#if MK_EMULATE_AMX
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_loadconfig
#undef _tile_release

namespace mk::cpu::MK_LEVEL {
namespace {

struct alignas(64) EmulatedTile {
  char row[16][64];
};
thread_local EmulatedTile emulated_tiles[8];

// bfloat16 of every second place, as float32; denormals count as zero.
inline __m512 emulated_operand(__m512i words, bool odd) {
  const __m512i wide = odd ? _mm512_and_si512(words, _mm512_set1_epi32(int(0xffff0000))) : _mm512_slli_epi32(words, 16);
  const __mmask16 normal = _mm512_test_epi32_mask(wide, _mm512_set1_epi32(0x7f800000));
  return _mm512_castsi512_ps(_mm512_maskz_mov_epi32(normal, wide));
}

// TDPBF16PS: even and odd terms of a row are summed from zero, each in its order, then joined and added on.
inline void emulated_product(EmulatedTile& c, const EmulatedTile& a, const EmulatedTile& b) {
  for (int m = 0; m < 16; m++) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int pair = 0; pair < 16; pair++) {
      int word;
      __builtin_memcpy(&word, a.row[m] + pair * 4, 4);
      const __m512i left = _mm512_set1_epi32(word), right = _mm512_load_si512(b.row[pair]);
      even = _mm512_fmadd_ps(emulated_operand(left, false), emulated_operand(right, false), even);
      odd = _mm512_fmadd_ps(emulated_operand(left, true), emulated_operand(right, true), odd);
    }
    _mm512_store_ps(c.row[m], _mm512_add_ps(_mm512_load_ps(c.row[m]), _mm512_add_ps(even, odd)));
  }
}
inline void emulated_load(EmulatedTile& tile, const void* from, int64_t stride) {
  for (int m = 0; m < 16; m++) __builtin_memcpy(tile.row[m], static_cast<const char*>(from) + m * stride, 64);
}
inline void emulated_store(const EmulatedTile& tile, void* to, int64_t stride) {
  for (int m = 0; m < 16; m++) __builtin_memcpy(static_cast<char*>(to) + m * stride, tile.row[m], 64);
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL

#define _tile_zero(i) (void)(emulated_tiles[i] = {})
#define _tile_loadd(i, from, stride) emulated_load(emulated_tiles[i], from, stride)
#define _tile_stream_loadd(i, from, stride) emulated_load(emulated_tiles[i], from, stride)
#define _tile_stored(i, to, stride) emulated_store(emulated_tiles[i], to, stride)
#define _tile_dpbf16ps(c, a, b) emulated_product(emulated_tiles[c], emulated_tiles[a], emulated_tiles[b])
#define _tile_loadconfig(shape) ((void)(shape))
// What is left in a tile must not matter: NaN everywhere.
#define _tile_release() __builtin_memset(emulated_tiles, 0xff, sizeof emulated_tiles)
#endif
