// Content weights of the heads of a DNC and their gradient, on a transposed memory: softmax(strength dot / norm) with
// dot = sum_w s k m, s the squared mask or 1, norm = |k|_s |m|_s + outside, |x|_s = sqrt(sum_w s x^2 + inside).
#pragma once
#include "cpu/dnc_sequence.h"
#include "cpu/generic/column_memory.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

// Scratch handed out piece by piece; without a base it only counts.
template <class A>
struct Pieces {
  A* base;
  int64_t used = 0;
  MK_INLINE A* operator()(int64_t n) {
    A* piece = base ? base + used : nullptr;
    used += (n + 31) / 16 * 16;
    return piece;
  }
};

// The heads of one kind: what column_memory's passes ask of their arguments, and the parts of the interface.
template <class A>
struct DncHeads {
  int64_t rows, width, heads;
  const A *key, *strength, *mask;  // mask: null without
  A inside, outside;
};

// What the content weights of `heads` heads go through; rows of similar and roots lie `rows` apart.
template <class A>
struct DncContent {
  A *seen, *squared, *similar, *roots, *key_roots, *slope, *turn, *along;
  MK_INLINE DncContent(const DncArgs& a, Pieces<A>& take) {
    const int64_t heads = a.readers > a.writers ? a.readers : a.writers, row = a.rows;
    seen = take(heads * a.width), squared = take(heads * a.width), similar = take(heads * row);
    roots = take(heads * row), key_roots = take(heads), slope = take(heads * row);
    turn = take(heads), along = take(heads * a.width);
  }
};

// The root, and with its slope's factor 1 / root: 0 at 0 instead of infinity.
template <class V>
MK_INLINE V over_root(V x, V root) {
  return select(root > V::zero(), x / select(root > V::zero(), root, V::set1(1)), V::zero());
}

// c.roots[h][n] = sum_w squared[h][w] m^2.
template <class A>
void dnc_masked_squares(const DncHeads<A>& a, const A* memory, int64_t stride, const DncContent<A>& c) {
  using V = Vec<A>;
  for_each_vec<V>(a.rows, [&](int64_t n, auto part) {
    for (int64_t h = 0; h < a.heads; h++) {
      V sum = V::zero();
      for (int64_t w = 0; w < a.width; w++) {
        const V m = load<V>(memory + w * stride + n, part);
        sum = fma(m * m, V::set1(c.squared[h * a.width + w]), sum);
      }
      store(sum, c.roots + h * a.rows + n, part);
    }
  });
}

// similar, roots and key_roots; without masks the rows have one root for all heads.
template <class A>
void dnc_similar(const DncHeads<A>& a, const A* memory, int64_t stride, const DncContent<A>& c) {
  using V = Vec<A>;
  const int64_t width = a.width;
  const A* key = a.key;
  if (a.mask) {
    for_each_vec<V>(a.heads * width, [&](int64_t j, auto part) {
      const V mask = load<V>(a.mask + j, part), squared = mask * mask;
      store(squared, c.squared + j, part), store(squared * load<V>(a.key + j, part), c.seen + j, part);
    });
    key = c.seen;
  }
  column_dots_all(a, memory, stride, a.heads, key, c.similar, c.roots);
  if (a.mask) dnc_masked_squares(a, memory, stride, c);
  const int64_t rooted = a.mask ? a.heads : 1;
  const V inside = V::set1(a.inside), outside = V::set1(a.outside);
  for_each_vec<V>(rooted * a.rows,
                  [&](int64_t n, auto part) { store(sqrt(load<V>(c.roots + n, part) + inside), c.roots + n, part); });
  for (int64_t h = 0; h < a.heads; h++) {
    c.key_roots[h] = root(dot_of(a.key + h * width, key + h * width, width) + a.inside);
    const V of_key = V::set1(c.key_roots[h]);
    const A* roots = c.roots + (a.mask ? h * a.rows : 0);
    A* similar = c.similar + h * a.rows;
    for_each_vec<V>(a.rows, [&](int64_t n, auto part) {
      const V norm = fma(of_key, in_part(load<V>(roots + n, part), V::set1(1), part), outside);
      store(load<V>(similar + n, part) / norm, similar + n, part);
    });
  }
}

// out[h] = softmax(scale x[h] + ...) over n of the rows of x; out may be x.
template <class A, class Logit>
MK_INLINE void softmax_run(int64_t n, A* out, const Logit& logit) {
  using V = Vec<A>;
  const V lowest = V::set1(-A(__builtin_inf()));
  V top = lowest, total = V::zero();
  for_each_vec<V>(n, [&](int64_t i, auto part) {
    const V x = logit(i, part);
    store(x, out + i, part);
    top = max(top, in_part(x, lowest, part));
  });
  const V most = V::set1(reduce_max(top));
  for_each_vec<V>(n, [&](int64_t i, auto part) {
    const V power = exp(load<V>(out + i, part) - most);
    store(power, out + i, part);
    total = total + in_part(power, V::zero(), part);
  });
  const V share = V::set1(1 / reduce_add(total));
  for_each_vec<V>(n, [&](int64_t i, auto part) { store(load<V>(out + i, part) * share, out + i, part); });
}

// Content weights, out[h][n].
template <class A>
void dnc_content(const DncHeads<A>& a, const A* memory, int64_t stride, const DncContent<A>& c, A* out) {
  using V = Vec<A>;
  if (!a.heads) return;
  dnc_similar(a, memory, stride, c);
  for (int64_t h = 0; h < a.heads; h++) {
    const V strength = V::set1(a.strength[h]);
    const A* similar = c.similar + h * a.rows;
    softmax_run(a.rows, out + h * a.rows, [&](int64_t n, auto part) { return strength * load<V>(similar + n, part); });
  }
}

// Gradients of the parts of the interface, in the order of DncHeads; and what else changes the gradient of the memory
// in the same pass: reads [H][W] of weights read [H][N], whose outer product is added.
template <class A>
struct DncHeadSlopes {
  A *key, *strength, *mask;
  const A *read = nullptr, *reads = nullptr;
};

// The gradient of the mask of head h: 2 mask (k along + d|m|^2 . m^2 + d|k|^2 k^2).
template <class A>
void dnc_mask_backward(const DncHeads<A>& a, const A* memory, int64_t stride, const DncContent<A>& c, int64_t h,
                       A* to) {
  using V = Vec<A>;
  const A *shrink = c.slope + h * a.rows, *mask = a.mask + h * a.width, *key = a.key + h * a.width,
          *along = c.along + h * a.width;
  for (int64_t j = 0; j < a.width; j++) {
    V squares = V::zero();
    for_each_vec<V>(a.rows, [&](int64_t n, auto part) {
      const V m = load<V>(memory + j * stride + n, part);
      squares = fma(load<V>(shrink + n, part), m * m, squares);
    });
    to[j] = mask[j] * (key[j] * (2 * along[j] + c.turn[h] * key[j]) + reduce_add(squares));
  }
}

// From dweights[h][n], overwritten, and what dnc_content left: fills `to`, adds to d, the gradient of the memory.
template <class A>
void dnc_content_backward(const DncHeads<A>& a, const A* memory, A* d, int64_t stride, const DncContent<A>& c,
                          const A* weights, A* dweights, const DncHeadSlopes<A>& to) {
  using V = Vec<A>;
  if (!a.heads) return;
  const V outside = V::set1(a.outside);
  for (int64_t h = 0; h < a.heads; h++) {
    const A *w = weights + h * a.rows, *similar = c.similar + h * a.rows;
    const A* roots = c.roots + (a.mask ? h * a.rows : 0);
    A *slope = dweights + h * a.rows, *shrink = c.slope + (a.mask ? h * a.rows : 0);  // shrink: 2 d|m|^2
    const V centre = V::set1(dot_of(slope, w, a.rows)), strength = V::set1(a.strength[h]);
    const V of_key = V::set1(c.key_roots[h]);
    const bool first = a.mask || h == 0;
    V dstrength = V::zero(), along = V::zero();
    for_each_vec<V>(a.rows, [&](int64_t n, auto part) {
      const V dlogit = load<V>(w + n, part) * (load<V>(slope + n, part) - centre), s = load<V>(similar + n, part);
      const V of_row = in_part(load<V>(roots + n, part), V::set1(1), part);
      dstrength = fma(dlogit, s, dstrength);
      const V ddot = dlogit * strength / fma(of_key, of_row, outside), dnorm = ddot * s;
      along = fma(dnorm, of_row, along);
      const V less = over_root(dnorm * of_key, of_row), before = first ? V::zero() : load<V>(shrink + n, part);
      store(before - less, shrink + n, part), store(ddot, slope + n, part);
    });
    to.strength[h] = reduce_add(dstrength);
    c.turn[h] = -reduce_max(over_root(V::set1(reduce_add(along)), of_key));  // 2 d|k|^2
  }
  column_sums(a, memory, stride, a.heads, dweights, c.along);
  for (int64_t h = 0; h < a.heads; h++) {
    const int64_t at = h * a.width;
    const A *keys = a.key + at, *along = c.along + at, *squared = c.squared + at;
    const V turn = V::set1(c.turn[h]);
    const bool masked = a.mask != nullptr;
    A* out = to.key + at;
    for_each_vec<V>(a.width, [&](int64_t j, auto part) {
      const V slope = fma(turn, load<V>(keys + j, part), load<V>(along + j, part));
      store(masked ? load<V>(squared + j, part) * slope : slope, out + j, part);
    });
    if (masked) dnc_mask_backward(a, memory, stride, c, h, to.mask + at);
  }
  column_add(a, stride, a.heads, dweights, a.mask ? c.seen : a.key, d);
  if (to.reads) column_add(a, stride, a.heads, to.read, to.reads, d);
  for_each_vec<V>(a.rows, [&](int64_t n, auto part) {
    const V shared = a.mask ? V::zero() : load<V>(c.slope + n, part);
    for (int64_t j = 0; j < a.width; j++) {
      V less = shared;
      for (int64_t h = 0; a.mask && h < a.heads; h++)
        less = fma(V::set1(c.squared[h * a.width + j]), load<V>(c.slope + h * a.rows + n, part), less);
      A* sum = d + j * stride + n;
      store(fma(less, load<V>(memory + j * stride + n, part), load<V>(sum, part)), sum, part);
    }
  });
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
