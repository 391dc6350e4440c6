// Products of a few rows with a matrix that lies in the L2 cache, and sums of outer products over very many rows.
// An element's sum runs in one order whatever rows stand beside it.
#pragma once
#include "common/types.h"

namespace mk::cpu::MK_LEVEL {
namespace {

// out[i][j ...] = bias[j ...] + sum_k x[i][k] b[k][j ...], M rows and N vectors of columns in registers.
template <int M, int N, class A, class Part>
MK_INLINE void times_columns(const A* x, int64_t xs, int64_t depth, const A* b, int64_t columns, const A* bias, A* out,
                             int64_t os, int64_t j, Part part) {
  using V = Vec<A>;
  constexpr int64_t L = V::kLanes;
  V sum[M][N];
  for (int l = 0; l < N; l++) {
    const V start = bias ? load<V>(bias + j + l * L, part) : V::zero();
    for (int i = 0; i < M; i++) sum[i][l] = start;
  }
  for (int64_t k = 0; k < depth; k++) {
    V row[N];
    for (int l = 0; l < N; l++) row[l] = load<V>(b + k * columns + j + l * L, part);
    for (int i = 0; i < M; i++) {
      const V scalar = V::set1(x[i * xs + k]);
      for (int l = 0; l < N; l++) sum[i][l] = fma(scalar, row[l], sum[i][l]);
    }
  }
  for (int i = 0; i < M; i++)
    for (int l = 0; l < N; l++) store(sum[i][l], out + i * os + j + l * L, part);
}

template <int M, int N, class A>
void times_rows(const A* x, int64_t xs, int64_t depth, const A* b, int64_t columns, const A* bias, A* out, int64_t os) {
  constexpr int64_t L = Vec<A>::kLanes;
  int64_t j = 0;
  for (; j + N * L <= columns; j += N * L) times_columns<M, N>(x, xs, depth, b, columns, bias, out, os, j, Full{});
  for (; j + L <= columns; j += L) times_columns<M, 1>(x, xs, depth, b, columns, bias, out, os, j, Full{});
  if (j < columns) times_columns<M, 1>(x, xs, depth, b, columns, bias, out, os, j, Tail{columns - j});
}

// out[i] = bias + x[i] b for `count` rows, b [depth][columns].
template <class A>
void times(const A* x, int64_t xs, int64_t count, int64_t depth, const A* b, int64_t columns, const A* bias, A* out,
           int64_t os) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) times_rows<8, 2>(x + i * xs, xs, depth, b, columns, bias, out + i * os, os);
  for (; i + 4 <= count; i += 4) times_rows<4, 4>(x + i * xs, xs, depth, b, columns, bias, out + i * os, os);
  for (; i < count; i++) times_rows<1, 8>(x + i * xs, xs, depth, b, columns, bias, out + i * os, os);
}

constexpr int64_t kLongSum = 128;  // rows summed at a stretch: short sums round less than one long one

template <int M, int N, class A, class Part>
MK_INLINE void outer_columns(const A* left, int64_t ls, const A* right, int64_t rs, int64_t count, A* out, int64_t os,
                             int64_t k, Part part) {
  using V = Vec<A>;
  constexpr int64_t L = V::kLanes;
  V sum[M][N];
  for (int j = 0; j < M; j++)
    for (int l = 0; l < N; l++) sum[j][l] = V::zero();
  for (int64_t r = 0; r < count; r++) {
    V row[N];
    for (int l = 0; l < N; l++) row[l] = load<V>(right + r * rs + k + l * L, part);
    for (int j = 0; j < M; j++) {
      const V scalar = V::set1(left[r * ls + j]);
      for (int l = 0; l < N; l++) sum[j][l] = fma(scalar, row[l], sum[j][l]);
    }
  }
  for (int j = 0; j < M; j++)
    for (int l = 0; l < N; l++) {
      A* to = out + j * os + k + l * L;
      store(load<V>(to, part) + sum[j][l], to, part);
    }
}

template <int M, class A>
void outer_rows(const A* left, int64_t ls, const A* right, int64_t rs, int64_t count, int64_t columns, A* out,
                int64_t os) {
  constexpr int64_t L = Vec<A>::kLanes;
  int64_t k = 0;
  for (; k + 4 * L <= columns; k += 4 * L) outer_columns<M, 4>(left, ls, right, rs, count, out, os, k, Full{});
  for (; k + L <= columns; k += L) outer_columns<M, 1>(left, ls, right, rs, count, out, os, k, Full{});
  if (k < columns) outer_columns<M, 1>(left, ls, right, rs, count, out, os, k, Tail{columns - k});
}

// out[j] += sum_r left[r][j] right[r], j < `number`; left [count][ls], right [count][rs].
template <class A>
void add_outer(const A* left, int64_t ls, int64_t number, const A* right, int64_t rs, int64_t count, int64_t columns,
               A* out, int64_t os) {
  for (int64_t r = 0; r < count; r += kLongSum) {
    const int64_t n = count - r < kLongSum ? count - r : kLongSum;
    int64_t j = 0;
    for (; j + 4 <= number; j += 4)
      outer_rows<4>(left + r * ls + j, ls, right + r * rs, rs, n, columns, out + j * os, os);
    for (; j < number; j++) outer_rows<1>(left + r * ls + j, ls, right + r * rs, rs, n, columns, out + j * os, os);
  }
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
