// Register tiles of matrix products: c[m][n] = sum_k a[m][k] b[k][n] + init[m][n], n a panel of N whole vectors, k in
// order.
//
// Every element is summed by the same chains of fma over k, whatever the tile it lies in: results do not depend on how
// rows are dealt out. b is packed: panel rows of N * lanes numbers, one after the other. a is read as it lies, by rows
// (a[m * lda + k]) or, for products that sum over rows, by columns (a[k * lda + m]). init and c never overlap: init is
// read after the first blocks of k were written.
#pragma once

namespace mk::cpu::MK_LEVEL {
namespace {

// Rows of a tile: as many as leave registers for one row of b (32 vector registers with AVX-512, 16 below).
constexpr int64_t tile_rows(int n) {
  return Vec<float>::kLanes == 16 ? (n == 4 ? 6 : n == 3 ? 9 : 14) : (n == 4 ? 2 : n == 3 ? 4 : 5);
}

constexpr int64_t kSumBlock = 128;  // longest chain of additions: blocks of k are summed from zero, then added in order

// sum + x w, or sum + (x - w)^2: what a tile sums.
struct Products {
  template <class V>
  static MK_INLINE V add(V x, V w, V sum) {
    return fma(x, w, sum);
  }
};
struct Distances {
  template <class V>
  static MK_INLINE V add(V x, V w, V sum) {
    return fma(x - w, x - w, sum);
  }
};

template <class A, int M, int N, bool kColumns, class Term>
void gemm_tile(int64_t count, const A* a, int64_t lda, const A* b, const A* init, int64_t ldi, A* c, int64_t ldc) {
  using V = Vec<A>;
  // Three rows share a base pointer: base, base + lda and base + 2 lda are addressing modes, so 14 rows need 5
  // registers.
  const A* row[(M + 2) / 3];
  for (int i = 0; i < (M + 2) / 3; i++) row[i] = kColumns ? a : a + 3 * i * lda;
  const int64_t blocks = (count + kSumBlock - 1) / kSumBlock,
                block = blocks > 1 ? (count + blocks - 1) / blocks : kSumBlock;
  for (int64_t begin = 0; begin == 0 || begin < count; begin += block) {
    V sum[M][N];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) sum[m][n] = V::zero();
    const int64_t left = count - begin < block ? count - begin : block;
    for (int64_t k = 0; k < left; k++) {
      // Each k reads another page of a: no hardware prefetcher follows.
      if (kColumns) __builtin_prefetch(row[0] + 16 * lda), __builtin_prefetch(row[0] + 16 * lda + M - 1);
      V w[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) w[n] = V::load(b + n * V::kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        const V x = V::set1(kColumns ? row[0][m] : row[m / 3][m % 3 * lda]);
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) sum[m][n] = Term::add(x, w[n], sum[m][n]);
      }
      for (int i = 0; i < (kColumns ? 1 : (M + 2) / 3); i++) row[i] += kColumns ? lda : 1;
      b += N * V::kLanes;
    }
    // The first term comes last: a large one would cost every partial sum its low bits.
    const bool last = begin + block >= count;
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        if (begin) sum[m][n] = V::load(c + m * ldc + n * V::kLanes) + sum[m][n];
        if (last && init) sum[m][n] = sum[m][n] + V::load(init + m * ldi + n * V::kLanes);
        sum[m][n].store(c + m * ldc + n * V::kLanes);
      }
  }
}

template <class A>
using GemmTile = void (*)(int64_t, const A*, int64_t, const A*, const A*, int64_t, A*, int64_t);

template <class A, int N, bool kColumns, class Term = Products>
MK_INLINE GemmTile<A> gemm_tile_for(int64_t rows) {
  switch (rows) {
#define MK_TILE(M) \
  case M:          \
    return gemm_tile<A, (M <= tile_rows(N) ? M : 1), N, kColumns, Term>
    MK_TILE(1);
    MK_TILE(2);
    MK_TILE(3);
    MK_TILE(4);
    MK_TILE(5);
    MK_TILE(6);
    MK_TILE(7);
    MK_TILE(8);
    MK_TILE(9);
    MK_TILE(10);
    MK_TILE(11);
    MK_TILE(12);
    MK_TILE(13);
#undef MK_TILE
    default:
      return gemm_tile<A, tile_rows(N), N, kColumns, Term>;
  }
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
