// merge_attention: weight_s = exp(lse_s - lse), lse = log sum_s exp(lse_s), out = sum_s weight_s out_s;
// douts_s = weight_s dout, dlses_s = weight_s (dout . out_s - sum_t weight_t dout . out_t + dlse)
//
// A task owns blocks of rows (b, h, q); weights of a block first, many rows to a vector, then row by row. A part of
// weight 0 is not read. Bytes per row: forward (S + 1) V elements, backward (2 S + 1) V. Precision: all in the
// accumulation type, parts in their order, one rounding at the end; weights are computed again in backward.
#include "cpu/generic/vec_math.inl.h"
#include "cpu/merge_attention.h"

namespace mk::cpu::MK_LEVEL {
namespace {

// Rows that lie in one (b, h): `count` from query q on.
struct MergeRows {
  int64_t b, h, q, count;
};

MK_INLINE MergeRows merge_rows(const MergeArgs& a, int64_t row, int64_t end) {
  const int64_t q = row % a.queries, left = a.queries - q, count = end - row < left ? end - row : left;
  return {row / a.queries / a.heads, row / a.queries % a.heads, q, count < kMergeRows ? count : kMergeRows};
}

template <class T>
MK_INLINE const T* merge_row(const void* data, const int64_t* stride, const MergeRows& r, int64_t i) {
  return static_cast<const T*>(data) + r.b * stride[0] + r.h * stride[1] + (r.q + i) * stride[2];
}

// weights[s][i] of the block's rows; where no part has a weight they are all 0. Returns tops and totals of the rows
// behind the weights and dots of all parts.
template <class A>
MK_INLINE A* merge_weights(const MergeArgs& a, const MergeRows& r, A* weights) {
  using V = Vec<A>;
  A *tops = weights + 2 * a.parts * kMergeRows, *totals = tops + kMergeRows;
  for (int64_t s = 0; s < a.parts; s++) {
    const A* from = static_cast<const A*>(a.lses) + s * a.lses_stride[0];
    for (int64_t i = 0; i < r.count; i++) weights[s * kMergeRows + i] = *merge_row<A>(from, a.lses_stride + 1, r, i);
  }
  const V low = V::set1(-__builtin_inf());
  for_each_vec<V>(r.count, [&](int64_t i, auto part) {
    V top = low, total = V::zero();
    for (int64_t s = 0; s < a.parts; s++) top = max(load<V>(weights + s * kMergeRows + i, part), top);
    store(top, tops + i, part);
    const V base = select(top == low, V::zero(), top);
    for (int64_t s = 0; s < a.parts; s++) {
      const V power = exp(load<V>(weights + s * kMergeRows + i, part) - base);
      total = total + power;
      store(power, weights + s * kMergeRows + i, part);
    }
    store(total, totals + i, part);
    const V divisor = select(total == V::zero(), V::set1(1), total);
    for (int64_t s = 0; s < a.parts; s++)
      store(load<V>(weights + s * kMergeRows + i, part) / divisor, weights + s * kMergeRows + i, part);
  });
  return tops;
}

template <class S>
void merge_attention_forward(const MergeArgs& a, int64_t begin, int64_t end, void* scratch) {
  using A = acc_t<S>;
  using V = Vec<A>;
  A* weights = static_cast<A*>(scratch);
  for (int64_t row = begin; row < end;) {
    const MergeRows r = merge_rows(a, row, end);
    const A *tops = merge_weights(a, r, weights), *totals = tops + kMergeRows;
    for_each_vec<V>(r.count, [&](int64_t i, auto part) {
      store(load<V>(tops + i, part) + log(load<V>(totals + i, part)), static_cast<A*>(a.lse) + row + i, part);
    });
    for (int64_t i = 0; i < r.count; i++) {
      const S* from = merge_row<S>(a.outs, a.outs_stride + 1, r, i);
      for_each_vec<V>(a.width, [&](int64_t j, auto part) {
        V sum = V::zero();
        for (int64_t s = 0; s < a.parts; s++)
          if (const A weight = weights[s * kMergeRows + i]; weight != A(0))
            sum = fma(V::set1(weight), load<V>(from + s * a.outs_stride[0] + j, part), sum);
        store(sum, static_cast<S*>(a.out) + (row + i) * a.width + j, part);
      });
    }
    row += r.count;
  }
}

// douts and the dots dout . out_s of one row and part.
template <class S, class A>
MK_INLINE A merge_part_backward(const MergeArgs& a, const S* dout, const S* out, A weight, S* douts) {
  using V = Vec<A>;
  V sum = V::zero();
  const V w = V::set1(weight);
  for_each_vec<V>(a.width, [&](int64_t j, auto part) {
    const V d = load<V>(dout + j, part);
    if (out) sum = fma(d, load<V>(out + j, part), sum);
    if (douts) store(w * d, douts + j, part);
  });
  return reduce_add(sum);
}

template <class S>
void merge_attention_backward(const MergeArgs& a, int64_t begin, int64_t end, void* scratch) {
  using A = acc_t<S>;
  using V = Vec<A>;
  A *weights = static_cast<A*>(scratch), *dots = weights + a.parts * kMergeRows;
  for (int64_t row = begin; row < end;) {
    const MergeRows r = merge_rows(a, row, end);
    merge_weights(a, r, weights);
    for (int64_t i = 0; i < r.count; i++) {
      A mean = 0;
      for (int64_t s = 0; s < a.parts; s++) {
        const A weight = weights[s * kMergeRows + i];
        S* douts = a.douts ? static_cast<S*>(a.douts) + (s * a.rows + row + i) * a.width : nullptr;
        A& dot = dots[s * kMergeRows + i] = 0;
        if (weight != A(0) && a.dout) {
          const S* out = merge_row<S>(a.outs, a.outs_stride + 1, r, i) + s * a.outs_stride[0];
          dot = merge_part_backward<S, A>(a, merge_row<S>(a.dout, a.dout_stride, r, i), a.dlses ? out : nullptr, weight,
                                          douts);
          mean += weight * dot;
        } else if (douts) {
          for_each_vec<V>(a.width, [&](int64_t j, auto part) { store(V::zero(), douts + j, part); });
        }
      }
      if (!a.dlses) continue;
      const A more = a.dlse ? *merge_row<A>(a.dlse, a.dlse_stride, r, i) : A(0);
      for (int64_t s = 0; s < a.parts; s++) {
        const A weight = weights[s * kMergeRows + i];
        static_cast<A*>(a.dlses)[s * a.rows + row + i] =
            weight != A(0) ? weight * (dots[s * kMergeRows + i] - mean + more) : A(0);
      }
    }
    row += r.count;
  }
}

}  // namespace

const MergeKernels merge_attention = {MK_FLOAT_TYPES(merge_attention_forward),
                                      MK_FLOAT_TYPES(merge_attention_backward)};

}  // namespace mk::cpu::MK_LEVEL
