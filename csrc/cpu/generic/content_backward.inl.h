// content_read and content_address, backward. With g_i = dread . value_i + dweights_i and delta = sum_i w_i g_i (=
// dread . read + ...):
//
//   ds_i = w_i (g_i - delta),  dstrength = sum_i ds_i c_i,  d_i = strength ds_i
//   dvalue_i = sum_r w_i dread_r
//   dmemory_i = sum_r a_i k_r - shrink_i m_i,  dkey_r = sum_i a_i m_i - k_r sum_i p_i   where
//     cosine: a = d / (norm_k norm_m), p = d c / norm_k^2, shrink = sum_r d c / norm_m^2;  dot: a = d, p = shrink = 0;
//     l2: a = p = 2 d, shrink = sum_r 2 d
//
// A task owns the same rows as forward: it writes their dmemory and dvalue and puts its sums for dkey and dstrength in
// its own partial. dstrength is summed as ds_i (c_i - mean c under w): the ds of a head sum to 0, so this changes
// nothing but the rounding, which then goes with the spread of c and not with its size. A task does not know the mean:
// it subtracts one of its own, combine makes up for it. Bytes per memory element (and value element): 1 read, 1 write.
// The weights are computed again from the saved maximum and sum.
#include "cpu/generic/content.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

template <class S>
void load_backward(const ContentArgs& a, int64_t b, ContentScratch<acc_t<S>>& t) {
  using A = acc_t<S>;
  load_keys<S>(a, b, t);
  for (int64_t r = 0; r < a.heads; r++) {
    const A* stats = static_cast<const A*>(a.stats) + (b * a.heads + r) * 2;
    const bool nothing = stats[1] == A(0);
    t.largest[r] = nothing ? A(__builtin_inf()) : stats[0];  // a weight is 0 then
    t.inverse[r] = nothing ? A(0) : A(1) / stats[1];
    t.delta[r] = a.delta ? static_cast<const A*>(a.delta)[b * a.heads + r] : A(0);
  }
  if (a.dread) widen_rows(static_cast<const S*>(a.dread) + b * a.dread_b, a.dread_r, a.heads, a.value_width, t.dread);
}

// The weights of head r at similarities c.
template <class A>
MK_INLINE Vec<A> weights_of(const ContentScratch<A>& t, int64_t r, Vec<A> c) {
  using V = Vec<A>;
  return exp(V::set1(t.strength[r]) * c - V::set1(t.largest[r])) * V::set1(t.inverse[r]);
}

// Gradient of the weights of head r of a tile, gathered from dweights.
template <class S>
MK_INLINE void gather_dweights(const ContentArgs& a, int64_t b, int64_t r, int64_t n, int64_t count,
                               const int32_t* index, acc_t<S>* out, bool add) {
  const S* dweights = static_cast<const S*>(a.dweights) + b * a.dweights_b + r * a.dweights_r + n;
  for (int64_t i = 0; i < count; i++) out[i] = (add ? out[i] : acc_t<S>(0)) + acc_t<S>(to_float(dweights[index[i]]));
}

template <class S>
void content_center(const ContentArgs& a, int64_t b, int64_t begin, int64_t end, void* partial, void* scratch) {
  using A = acc_t<S>;
  using V = Vec<A>;
  ContentScratch<A> t(a, scratch);
  load_backward<S>(a, b, t);
  A* sums = static_cast<A*>(partial);
  for (int64_t r = 0; r < a.heads; r++) sums[r] = 0;
  const S* memory = static_cast<const S*>(a.memory) + b * a.memory_b;
  for (int64_t n = begin; n < end; n += a.tile) {
    const int64_t rows = end - n < a.tile ? end - n : a.tile, count = list_rows(a, b, n, rows, t.index);
    similarities(a, Rows<S>{memory + n * a.memory_n, a.memory_n, t.index, count, a.width}, t);
    for (int64_t r = 0; r < a.heads; r++) {
      gather_dweights<S>(a, b, r, n, count, t.index, t.gradient, false);
      V sum = V::zero();
      for_each_vec<V>(count, [&](int64_t i, auto part) {
        const V w = weights_of(t, r, load<V>(t.logit + r * kTile + i, part));
        sum = in_part(fma(w, load<V>(t.gradient + i, part), sum), sum, part);
      });
      sums[r] += reduce_add(sum);
    }
  }
}

template <class S>
void content_delta(const ContentArgs& a, int64_t b, const void* partials, int64_t chunks) {
  using A = acc_t<S>;
  using V = Vec<A>;
  for (int64_t r = 0; r < a.heads; r++) {
    V sum = V::zero();
    if (a.dread) {
      const S* dread = static_cast<const S*>(a.dread) + b * a.dread_b + r * a.dread_r;
      const A* total = static_cast<const A*>(a.total) + (b * a.heads + r) * a.value_width;
      for_each_vec<V>(a.value_width, [&](int64_t j, auto part) {
        sum = fma(load<V>(dread + j, part), load<V>(total + j, part), sum);
      });
    }
    A delta = reduce_add(sum);
    for (int64_t c = 0; c < chunks; c++) delta += static_cast<const A*>(partials)[c * a.heads + r];
    static_cast<A*>(a.delta)[b * a.heads + r] = delta;
  }
}

// Mean of c over the rows of a tile, weighted by w: what dstrength is summed around.
template <class A>
A mean_similarity(const ContentScratch<A>& t, int64_t r, int64_t count) {
  using V = Vec<A>;
  V sum = V::zero(), weights = V::zero();
  for_each_vec<V>(count, [&](int64_t i, auto part) {
    const V c = load<V>(t.logit + r * kTile + i, part), w = weights_of(t, r, c);
    sum = in_part(fma(w, c, sum), sum, part);
    weights = in_part(weights + w, weights, part);
  });
  const A total = reduce_add(weights);
  return total > 0 ? reduce_add(sum) / total : A(0);
}

// One head of a tile: c in t.logit becomes w, t.along becomes a, and the head's shares go into shrink and sums[0,
// heads, ...]: of p, ds (c - center), ds and w c. sums[4 heads] is the center.
template <class A>
void head_gradients(Similarity similarity, ContentScratch<A>& t, int64_t r, int64_t count, A* sums, int64_t heads) {
  using V = Vec<A>;
  const V strength = V::set1(t.strength[r]), delta = V::set1(t.delta[r]), norm_key = V::set1(t.norm[r]);
  const V center = V::set1(sums[4 * heads]);
  V part_sum = V::zero(), strength_sum = V::zero(), ds_sum = V::zero(), c_sum = V::zero();
  for_each_vec<V>(count, [&](int64_t i, auto part) {
    A* logit = t.logit + r * kTile + i;
    const V c = load<V>(logit, part);
    const V w = weights_of(t, r, c);
    const V ds = w * (load<V>(t.gradient + r * kTile + i, part) - delta), d = strength * ds;
    strength_sum = in_part(fma(ds, c - center, strength_sum), strength_sum, part);
    ds_sum = in_part(ds_sum + ds, ds_sum, part);
    c_sum = in_part(fma(w, c, c_sum), c_sum, part);
    V along = d, share = V::zero();
    if (similarity == Similarity::cosine) {
      const V norm = in_part(load<V>(t.squares + i, part), V::set1(A(1)), part);
      share = d * c;
      store(load<V>(t.shrink + i, part) + share / (norm * norm), t.shrink + i, part);
      along = d / (norm_key * norm);
    } else if (similarity == Similarity::l2) {
      along = share = d + d;
      store(load<V>(t.shrink + i, part) + share, t.shrink + i, part);
    }
    part_sum = in_part(part_sum + share, part_sum, part);
    store(w, logit, part);
    store(along, t.along + r * kTile + i, part);
  });
  sums[0] += similarity == Similarity::cosine ? reduce_add(part_sum) / (t.norm[r] * t.norm[r]) : reduce_add(part_sum);
  sums[heads] += reduce_add(strength_sum);
  sums[2 * heads] += reduce_add(ds_sum);
  sums[3 * heads] += reduce_add(c_sum);
}

// Rows a mask hides get gradient 0.
template <class S>
MK_INLINE void clear_hidden(const int32_t* index, int64_t count, int64_t rows, int64_t width, S* out) {
  using V = Vec<acc_t<S>>;
  for (int64_t i = 0, next = 0; i < rows; i++) {
    if (next < count && index[next] == i) {
      next++;
      continue;
    }
    for_each_vec<V>(width, [&](int64_t j, auto part) { store(V::zero(), out + i * width + j, part); });
  }
}

template <class S>
void content_backward(const ContentArgs& a, int64_t b, int64_t begin, int64_t end, void* partial, void* scratch) {
  using A = acc_t<S>;
  using V = Vec<A>;
  ContentScratch<A> t(a, scratch);
  load_backward<S>(a, b, t);
  A *dkey = static_cast<A*>(partial), *sums = dkey + a.heads * a.width;
  for (int64_t i = 0; i < backward_partial(a); i++) dkey[i] = 0;
  const S* memory = static_cast<const S*>(a.memory) + b * a.memory_b;
  const S* value = a.value ? static_cast<const S*>(a.value) + b * a.value_b : memory;
  const int64_t value_n = a.value ? a.value_n : a.memory_n;
  const bool shrinks = a.similarity != Similarity::dot;
  for (int64_t n = begin; n < end; n += a.tile) {
    const int64_t rows = end - n < a.tile ? end - n : a.tile, count = list_rows(a, b, n, rows, t.index);
    const bool more = n + (kAhead + 1) * a.tile <= a.rows;
    const S* next = more ? memory + (n + kAhead * a.tile) * a.memory_n : nullptr;
    const S* next_value = more && a.value ? value + (n + kAhead * a.tile) * value_n : nullptr;
    const Rows<S> tile{memory + n * a.memory_n, a.memory_n, t.index, count, a.width, next, !a.dkey};
    const Rows<S> values{value + n * value_n, value_n, t.index, count, a.value_width, next_value, true};
    similarities(a, tile, t);
    if (a.dread) dot_rows<S, Dot::plain>(values, a.heads, t.dread, t.gradient);
    for (int64_t i = 0; i < kTile; i += V::kLanes) V::zero().store(t.shrink + i);
    for (int64_t r = 0; r < a.heads; r++) {
      A* gradient = t.gradient + r * kTile;
      if (a.dweights)
        gather_dweights<S>(a, b, r, n, count, t.index, gradient, a.dread != nullptr);
      else if (!a.dread)
        for (int64_t i = 0; i < count; i++) gradient[i] = 0;
      if (n == begin) sums[4 * a.heads + r] = mean_similarity(t, r, count);
      head_gradients(a.similarity, t, r, count, sums + r, a.heads);
    }
    const Outer<A> from_key{t.along, t.key}, from_read{a.dread ? t.logit : nullptr, t.dread}, none{nullptr, nullptr};
    if (a.dmemory) {
      S* out = static_cast<S*>(a.dmemory) + (b * a.rows + n) * a.width;
      mix_rows(tile, a.heads, from_key, a.value ? none : from_read, shrinks ? t.shrink : nullptr, out);
      clear_hidden(t.index, count, rows, a.width, out);
    }
    if (a.dvalue) {
      S* out = static_cast<S*>(a.dvalue) + (b * a.rows + n) * a.value_width;
      mix_rows<S>(values, a.heads, from_read, none, nullptr, out);
      clear_hidden(t.index, count, rows, a.value_width, out);
    }
    if (a.dkey) add_rows(tile, a.heads, t.along, dkey);
  }
}

template <class S>
void content_backward_combine(const ContentArgs& a, int64_t b, const void* partials, int64_t chunks) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const A* all = static_cast<const A*>(partials);
  const int64_t size = backward_partial(a), parts = a.heads * a.width;
  for (int64_t r = 0; r < a.heads; r++) {
    A share = 0, dstrength = 0, mean = 0;
    const auto number = [&](int64_t c, int which) { return all[c * size + parts + which * a.heads + r]; };
    for (int64_t c = 0; c < chunks; c++) share += number(c, 0), mean += number(c, 3);
    for (int64_t c = 0; c < chunks; c++) dstrength += number(c, 1) + (number(c, 4) - mean) * number(c, 2);
    if (a.dstrength) static_cast<S*>(a.dstrength)[b * a.heads + r] = convert<S>::from(dstrength);
    if (!a.dkey) continue;
    const S* key = static_cast<const S*>(a.key) + b * a.key_b + r * a.key_r;
    S* dkey = static_cast<S*>(a.dkey) + (b * a.heads + r) * a.width;
    for_each_vec<V>(a.width, [&](int64_t j, auto part) {
      V sum = V::zero();
      for (int64_t c = 0; c < chunks; c++) sum = sum + load<V>(all + c * size + r * a.width + j, part);
      store(fma(V::set1(-share), load<V>(key + j, part), sum), dkey + j, part);
    });
  }
}

}  // namespace

const ContentKernels content = {
    MK_FLOAT_TYPES(content_forward),          MK_FLOAT_TYPES(content_combine), MK_FLOAT_TYPES(content_weigh),
    MK_FLOAT_TYPES(content_center),           MK_FLOAT_TYPES(content_delta),   MK_FLOAT_TYPES(content_backward),
    MK_FLOAT_TYPES(content_backward_combine),
};

}  // namespace mk::cpu::MK_LEVEL
