// Passes over the memory of one batch row that lies transposed, m[w][n] with `stride` elements from one w to the next,
// so that all of them run over whole vectors of rows n: dot products, writing, reading, and the gradients of the last
// two. `Args` gives rows, width, readers, writers; `Heads` points at erase and add, [U][W].
#pragma once
#include "common/types.h"

namespace mk::cpu::MK_LEVEL {
namespace {

template <class A>
MK_INLINE A root(A x) {
  return reduce_max(sqrt(Vec<A>::set1(x)));
}

template <class A>
MK_INLINE A dot_of(const A* x, const A* y, int64_t n) {
  using V = Vec<A>;
  V sum = V::zero();
  for_each_vec<V>(n, [&](int64_t i, auto part) { sum = fma(load<V>(x + i, part), load<V>(y + i, part), sum); });
  return reduce_add(sum);
}

// log(1 + e^x), small results to full relative precision.
template <class V>
MK_INLINE V softplus(V x) {
  const V one = V::set1(1), e = exp(copysign(x, V::set1(-1))), u = one + e;
  const V tail = select(u == one, e, log(u) * (e / select(u == one, one, u - one)));
  return max(V::zero(), x) + tail;
}

// dot[h][n] = key[h] . row n, H heads, and the squared norms of the rows.
template <int H, int N, class Args, class A, class Part>
MK_INLINE void column_dots(const Args& a, const A* memory, int64_t stride, const A* key, A* dot, A* squares, int64_t n,
                           Part part) {
  using V = Vec<A>;
  constexpr int64_t L = V::kLanes;
  V sum[H][N], square[N];
  for (int l = 0; l < N; l++) {
    square[l] = V::zero();
    for (int h = 0; h < H; h++) sum[h][l] = V::zero();
  }
  for (int64_t w = 0; w < a.width; w++)
    for (int l = 0; l < N; l++) {
      const V m = load<V>(memory + w * stride + n + l * L, part);
      square[l] = fma(m, m, square[l]);
      for (int h = 0; h < H; h++) sum[h][l] = fma(V::set1(key[h * a.width + w]), m, sum[h][l]);
    }
  for (int l = 0; l < N; l++) {
    store(square[l], squares + n + l * L, part);
    for (int h = 0; h < H; h++) store(sum[h][l], dot + h * a.rows + n + l * L, part);
  }
}

template <int H, class Args, class A>
void column_dots_of(const Args& a, const A* memory, int64_t stride, const A* key, A* dot, A* squares) {
  constexpr int64_t L = Vec<A>::kLanes;
  int64_t n = 0;
  for (; n + 4 * L <= a.rows; n += 4 * L) column_dots<H, 4>(a, memory, stride, key, dot, squares, n, Full{});
  for (; n + L <= a.rows; n += L) column_dots<H, 1>(a, memory, stride, key, dot, squares, n, Full{});
  if (n < a.rows) column_dots<H, 1>(a, memory, stride, key, dot, squares, n, Tail{a.rows - n});
}

// The same for any number of heads.
template <class Args, class A>
void column_dots_all(const Args& a, const A* memory, int64_t stride, int64_t heads, const A* key, A* dot, A* squares) {
  int64_t h = 0;
  for (; h + 4 <= heads; h += 4) column_dots_of<4>(a, memory, stride, key + h * a.width, dot + h * a.rows, squares);
  if (h + 2 <= heads) column_dots_of<2>(a, memory, stride, key + h * a.width, dot + h * a.rows, squares), h += 2;
  if (h < heads) column_dots_of<1>(a, memory, stride, key + h * a.width, dot + h * a.rows, squares);
}

// d[w][n] += sum_h x[h][n] v[h][w]
template <int H, class Args, class A>
void column_add_of(const Args& a, int64_t stride, const A* x, const A* v, A* d) {
  using V = Vec<A>;
  const int64_t width = a.width, rows = a.rows;
  for_each_vec<V>(rows, [&](int64_t n, auto part) {
    V own[H];
    for (int h = 0; h < H; h++) own[h] = load<V>(x + h * rows + n, part);
    A* to = d + n;
    for (int64_t w = 0; w < width; w++, to += stride) {
      V sum = load<V>(to, part);
      for (int h = 0; h < H; h++) sum = fma(V::set1(v[h * width + w]), own[h], sum);
      store(sum, to, part);
    }
  });
}

template <class Args, class A>
void column_add(const Args& a, int64_t stride, int64_t heads, const A* x, const A* v, A* d) {
  int64_t h = 0;
  for (; h + 4 <= heads; h += 4) column_add_of<4>(a, stride, x + h * a.rows, v + h * a.width, d);
  if (h + 2 <= heads) column_add_of<2>(a, stride, x + h * a.rows, v + h * a.width, d), h += 2;
  if (h < heads) column_add_of<1>(a, stride, x + h * a.rows, v + h * a.width, d);
}

// out = memory after the write of all heads with weights [U][N]; may be the memory itself.
template <class A, class Args, class Heads>
void column_write(const Args& a, const A* memory, A* out, int64_t stride, const A* weights, const Heads& heads) {
  using V = Vec<A>;
  for_each_vec<V>(a.rows, [&](int64_t n, auto part) {
    for (int64_t w = 0; w < a.width; w++) {
      V kept = V::set1(1), added = V::zero();
      for (int64_t u = 0; u < a.writers; u++) {
        const V weight = load<V>(weights + u * a.rows + n, part);
        kept = kept * fma(weight, V::set1(-heads.erase[u * a.width + w]), V::set1(1));
        added = fma(weight, V::set1(heads.add[u * a.width + w]), added);
      }
      store(fma(load<V>(memory + w * stride + n, part), kept, added), out + w * stride + n, part);
    }
  });
}

// out[h][w] = x[h] . m[w] for H vectors x [N]; the lanes of as many sums as a vector holds are added up together.
template <int H, class Args, class A>
void column_sums_of(const Args& a, const A* memory, int64_t stride, const A* x, A* out) {
  using V = Vec<A>;
  constexpr int64_t L = V::kLanes;
  alignas(64) A lanes[H * L * L];
  if (a.width % L)  // sums that are not asked for
    for (int64_t i = 0; i < H * L * L; i += L) V::zero().store(lanes + i);
  for (int64_t first = 0; first < a.width; first += L) {
    const int64_t columns = a.width - first < L ? a.width - first : L;
    for (int64_t w = 0; w < columns; w += 2) {
      const A *one = memory + (first + w) * stride, *two = w + 1 < columns ? one + stride : one;
      V sum[H][2];
      for (int h = 0; h < H; h++) sum[h][0] = sum[h][1] = V::zero();
      for_each_vec<V>(a.rows, [&](int64_t n, auto part) {
        const V m = load<V>(one + n, part), other = load<V>(two + n, part);
        for (int h = 0; h < H; h++) {
          const V v = load<V>(x + h * a.rows + n, part);
          sum[h][0] = fma(v, m, sum[h][0]), sum[h][1] = fma(v, other, sum[h][1]);
        }
      });
      for (int h = 0; h < H; h++) {
        sum[h][0].store(lanes + (h * L + w) * L);
        if (w + 1 < L) sum[h][1].store(lanes + (h * L + w + 1) * L);
      }
    }
    for (int h = 0; h < H; h++) reduce_add_each(lanes + h * L * L).store(out + h * a.width + first, columns);
  }
}

template <class Args, class A>
void column_sums(const Args& a, const A* memory, int64_t stride, int64_t heads, const A* x, A* out) {
  int64_t h = 0;
  for (; h + 4 <= heads; h += 4) column_sums_of<4>(a, memory, stride, x + h * a.rows, out + h * a.width);
  if (h + 2 <= heads) column_sums_of<2>(a, memory, stride, x + h * a.rows, out + h * a.width), h += 2;
  if (h < heads) column_sums_of<1>(a, memory, stride, x + h * a.rows, out + h * a.width);
}

// reads[r][w] = weights[r] . m[w]
template <class A, class Args>
void column_read(const Args& a, const A* memory, int64_t stride, const A* weights, A* reads) {
  column_sums(a, memory, stride, a.readers, weights, reads);
}

// Gradients of reading and writing in one pass over d, the gradient of the memory after the step, which becomes that of
// the memory before it: adds to dweights [R + U][N], fills derase and dadd before their activations' slopes.
template <class A, class Args, class Heads>
void column_access_backward(const Args& a, const A* before, const A* after, A* d, int64_t stride, const A* weights,
                            const A* dreads, A* dweights, const Heads& heads, const Heads& dheads) {
  using V = Vec<A>;
  const A* source = a.reads_written() ? after : before;
  const int64_t first = a.readers * a.rows;
  for (int64_t w = 0; w < a.width; w++) {
    A* row = d + w * stride;
    const auto read = [&] {
      for (int64_t r = 0; r < a.readers; r++) {
        const V dread = V::set1(dreads[r * a.width + w]);
        for_each_vec<V>(a.rows, [&](int64_t n, auto part) {
          A* to = dweights + r * a.rows + n;
          store(fma(dread, load<V>(source + w * stride + n, part), load<V>(to, part)), to, part);
          store(fma(dread, load<V>(weights + r * a.rows + n, part), load<V>(row + n, part)), row + n, part);
        });
      }
    };
    if (a.reads_written()) read();
    for (int64_t u = 0; u < a.writers; u++) {
      const V erase = V::set1(heads.erase[u * a.width + w]), add = V::set1(heads.add[u * a.width + w]);
      V derase = V::zero(), dadd = V::zero();
      for_each_vec<V>(a.rows, [&](int64_t n, auto part) {
        const V slope = load<V>(row + n, part), weight = load<V>(weights + first + u * a.rows + n, part);
        V others = slope * load<V>(before + w * stride + n, part);
        for (int64_t v = 0; v < a.writers; v++)
          if (v != u)
            others = others * fma(load<V>(weights + first + v * a.rows + n, part),
                                  V::set1(-heads.erase[v * a.width + w]), V::set1(1));
        A* to = dweights + first + u * a.rows + n;
        store(fma(slope, add, load<V>(to, part)) - others * erase, to, part);
        derase = derase - weight * others;
        dadd = fma(weight, slope, dadd);
      });
      dheads.erase[u * a.width + w] = reduce_add(derase), dheads.add[u * a.width + w] = reduce_add(dadd);
    }
    for_each_vec<V>(a.rows, [&](int64_t n, auto part) {
      V kept = load<V>(row + n, part);
      for (int64_t u = 0; u < a.writers; u++)
        kept = kept *
               fma(load<V>(weights + first + u * a.rows + n, part), V::set1(-heads.erase[u * a.width + w]), V::set1(1));
      store(kept, row + n, part);
    });
    if (!a.reads_written()) read();
  }
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
