// content_read and content_address, forward and what both directions share.
//
//   c[r][i] = k_r . m_i / (sqrt(|k_r|^2 + e) sqrt(|m_i|^2 + e))  |  k_r . m_i  |  -|k_r - m_i|^2
//   weights[r] = softmax_i(strength_r c[r][i]),  read[r] = sum_i weights[r][i] value_i
//
// A task owns a fixed range of rows of one batch entry and walks it in tiles that stay in the L1 cache: dot products of
// all heads and row norms, exponentials against the running maximum (online softmax), weighted sums. Its maximum, sum
// and weighted rows go to its own partial; `combine` merges the partials of an entry in order. Masked rows are left out
// of the tile's index and never read. Bytes per memory element (and value element): 1 read. Weights, when wanted: one
// write of logits, one read and write to normalise. Precision: everything in the accumulation type; the maximum, the
// sum and the unrounded read are kept for backward: weights from a rounded log-sum-exp would not add up to 1.
#include "cpu/content.h"
#include "cpu/generic/rows.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

// What a task keeps beside its tile.
template <class A>
struct ContentScratch {
  A *key, *norm, *strength, *largest, *inverse, *delta, *dread;  // [R][W], [R] five times, [R][V]
  A *logit, *along, *gradient;                                   // [R][kTile]
  A *squares, *shrink;                                           // [kTile]
  int32_t* index;                                                // [kTile]

  MK_INLINE ContentScratch(const ContentArgs& a, void* memory) {
    A* next = static_cast<A*>(memory);
    const auto take = [&](int64_t n) {
      A* out = next;
      next += n;
      return out;
    };
    logit = take(a.heads * kTile), along = take(a.heads * kTile), gradient = take(a.heads * kTile);
    squares = take(kTile), shrink = take(kTile), index = reinterpret_cast<int32_t*>(take(kTile));
    key = take(a.heads * a.width), dread = take(a.heads * a.value_width);
    for (int64_t i = 0; i < kTile; i++) index[i] = int32_t(i);
    norm = take(a.heads), strength = take(a.heads), delta = take(a.heads);
    largest = take(a.heads), inverse = take(a.heads);
  }
};

template <class A>
MK_INLINE Vec<A> guarded_norm(Vec<A> squares) {
  return sqrt(squares + Vec<A>::set1(A(1e-6)));
}

template <class S>
void load_keys(const ContentArgs& a, int64_t b, ContentScratch<acc_t<S>>& t) {
  using A = acc_t<S>;
  using V = Vec<A>;
  widen_rows(static_cast<const S*>(a.key) + b * a.key_b, a.key_r, a.heads, a.width, t.key);
  const S* strength = static_cast<const S*>(a.strength) + b * a.strength_b;
  for (int64_t r = 0; r < a.heads; r++) {
    V sum = V::zero();
    for_each_vec<V>(a.width, [&](int64_t j, auto part) {
      const V k = load<V>(t.key + r * a.width + j, part);
      sum = fma(k, k, sum);
    });
    (a.similarity == Similarity::cosine ? guarded_norm(V::set1(reduce_add(sum))) : V::set1(A(1))).store(t.norm + r, 1);
    t.strength[r] = A(to_float(strength[r]));
  }
}

// The rows of a tile that take part, as offsets from its first row.
MK_INLINE int64_t list_rows(const ContentArgs& a, int64_t b, int64_t first, int64_t rows, int32_t* index) {
  if (!a.mask) return rows;  // all of them, as the scratch was set up
  int64_t count = 0;
  for (int64_t i = 0; i < rows; i++) {
    index[count] = int32_t(i);
    count += a.mask[b * a.mask_b + first + i];
  }
  return count;
}

// t.logit[r][i] = similarity c of head r and row i; t.squares[i] = the guarded norm of row i (cosine only).
template <class S>
void similarities(const ContentArgs& a, const Rows<S>& rows, ContentScratch<acc_t<S>>& t) {
  using V = Vec<acc_t<S>>;
  constexpr int64_t L = V::kLanes;
  if (a.similarity == Similarity::dot) return dot_rows<S, Dot::plain>(rows, a.heads, t.key, t.logit);
  if (a.similarity == Similarity::l2) {
    dot_rows<S, Dot::distance>(rows, a.heads, t.key, t.logit);
    for (int64_t r = 0; r < a.heads; r++)
      for (int64_t i = 0; i < rows.count; i += L) (-V::load(t.logit + r * kTile + i)).store(t.logit + r * kTile + i);
    return;
  }
  dot_rows<S, Dot::squares>(rows, a.heads, t.key, t.logit, t.squares);
  for (int64_t i = 0; i < rows.count; i += L) {
    const V norm = guarded_norm(V::load(t.squares + i));
    norm.store(t.squares + i);
    for (int64_t r = 0; r < a.heads; r++) {
      acc_t<S>* c = t.logit + r * kTile + i;
      (V::load(c) / (V::set1(t.norm[r]) * norm)).store(c);
    }
  }
}

// Logits of one head of a tile to the [B, R, N] array; hidden rows get -inf, so that their weight comes out as exactly
// 0.
template <class A>
void keep_logits(const A* logit, const int32_t* index, int64_t count, int64_t rows, A* out) {
  if (count < rows)
    for (int64_t i = 0; i < rows; i++) out[i] = A(-__builtin_inf());
  for (int64_t i = 0; i < count; i++) out[index[i]] = logit[i];
}

// Turns c of one head into exp(strength c - largest) and updates the head's maximum, sum and weighted rows.
template <class A>
void soften(A strength, int64_t count, A* logit, A& largest, A& sum, A* rows, int64_t width) {
  using V = Vec<A>;
  V top = V::set1(largest);
  for_each_vec<V>(count, [&](int64_t i, auto part) {
    const V x = V::set1(strength) * load<V>(logit + i, part);
    store(x, logit + i, part);
    top = in_part(max(x, top), top, part);  // NaN is left out here and comes back through its exponential
  });
  const A now = reduce_max(top);
  if (now == A(-__builtin_inf())) {  // nothing yet, or NaN only
    for (int64_t i = 0; i < count; i++) sum += logit[i] = logit[i] == logit[i] ? A(0) : logit[i];
    return;
  }
  if (now != largest) {
    const V shrink = exp(V::set1(largest - now));
    A factor[V::kLanes];
    shrink.store(factor);
    sum *= factor[0];
    for_each_vec<V>(width, [&](int64_t j, auto part) { store(load<V>(rows + j, part) * shrink, rows + j, part); });
    largest = now;
  }
  V total = V::zero();
  for_each_vec<V>(count, [&](int64_t i, auto part) {
    const V e = exp(load<V>(logit + i, part) - V::set1(now));
    store(e, logit + i, part);
    total = total + in_part(e, V::zero(), part);
  });
  sum += reduce_add(total);
}

template <class S>
void content_forward(const ContentArgs& a, int64_t b, int64_t begin, int64_t end, void* partial, void* scratch) {
  using A = acc_t<S>;
  ContentScratch<A> t(a, scratch);
  load_keys<S>(a, b, t);
  const int64_t out_width = a.reads ? a.value_width : 0;
  A *largest = static_cast<A*>(partial), *sum = largest + a.heads, *read = sum + a.heads;
  for (int64_t r = 0; r < a.heads; r++) largest[r] = A(-__builtin_inf()), sum[r] = 0;
  for (int64_t i = 0; i < a.heads * out_width; i++) read[i] = 0;
  const S* memory = static_cast<const S*>(a.memory) + b * a.memory_b;
  const S* value = a.value ? static_cast<const S*>(a.value) + b * a.value_b : memory;
  const int64_t value_n = a.value ? a.value_n : a.memory_n;
  const bool once = a.value || !a.reads;  // a tile of the memory, and one of the values, is passed over once
  for (int64_t n = begin; n < end; n += a.tile) {
    const int64_t rows = end - n < a.tile ? end - n : a.tile, count = list_rows(a, b, n, rows, t.index);
    const bool more = n + (kAhead + 1) * a.tile <= a.rows;  // of the next task too: it mostly follows on this thread
    const int64_t coming = n + kAhead * a.tile;
    const S *next = memory + coming * a.memory_n, *next_value = value + coming * value_n;
    const Rows<S> values{
        value + n * value_n, value_n, t.index, count, out_width, more && a.reads ? next_value : nullptr, once};
    similarities(a, Rows<S>{memory + n * a.memory_n, a.memory_n, t.index, count, a.width, more ? next : nullptr, once},
                 t);
    for (int64_t r = 0; r < a.heads; r++) {
      values.fetch_early(r);
      if (a.logits) {
        A* kept = static_cast<A*>(a.logits) + (b * a.heads + r) * a.rows + n;
        for (int64_t i = 0; i < count; i++) t.along[i] = t.strength[r] * t.logit[r * kTile + i];
        keep_logits(t.along, t.index, count, rows, kept);
      }
      soften(t.strength[r], count, t.logit + r * kTile, largest[r], sum[r], read + r * out_width, out_width);
    }
    if (!a.reads) continue;
    add_rows(values, a.heads, t.logit, read);
  }
}

template <class S>
void content_combine(const ContentArgs& a, int64_t b, const void* partials, int64_t chunks) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const A *all = static_cast<const A*>(partials), minus_infinity = A(-__builtin_inf());
  const int64_t size = forward_partial(a), width = a.reads ? a.value_width : 0;
  for (int64_t r = 0; r < a.heads; r++) {
    A largest = minus_infinity;
    for (int64_t c = 0; c < chunks; c++) largest = largest < all[c * size + r] ? all[c * size + r] : largest;
    const auto factor = [&](int64_t c) {
      return exp(V::set1(all[c * size + r] - (largest == minus_infinity ? A(0) : largest)));
    };
    A plain = 0;
    V sum = V::zero();
    for (int64_t c = 0; c < chunks; c++) {
      plain += all[c * size + a.heads + r];
      sum = fma(factor(c), V::set1(all[c * size + a.heads + r]), sum);
    }
    const bool nothing = largest == minus_infinity && plain == 0;
    A* stats = static_cast<A*>(a.stats) + (b * a.heads + r) * 2;
    stats[0] = largest;
    (nothing ? V::zero() : sum).store(stats + 1, 1);
    const V scale = nothing ? V::zero() : V::set1(A(1)) / sum;
    A* total = static_cast<A*>(a.total) + (b * a.heads + r) * width;
    for_each_vec<V>(width, [&](int64_t j, auto part) { store(V::zero(), total + j, part); });
    for (int64_t c = 0; c < chunks && width; c++) {
      const V f = factor(c) * scale;
      const A* read = all + c * size + 2 * a.heads + r * width;
      for_each_vec<V>(width, [&](int64_t j, auto part) {
        store(fma(f, load<V>(read + j, part), load<V>(total + j, part)), total + j, part);
      });
    }
    S* read = static_cast<S*>(a.read) + (b * a.heads + r) * width;
    for_each_vec<V>(a.reads ? width : 0,
                    [&](int64_t j, auto part) { store(load<V>(total + j, part), read + j, part); });
  }
}

// weights = exp(logits - largest) / sum, exactly 0 where no row takes part.
template <class S>
void content_weigh(const ContentArgs& a, int64_t b, int64_t begin, int64_t end) {
  using A = acc_t<S>;
  using V = Vec<A>;
  for (int64_t r = 0; r < a.heads; r++) {
    const int64_t row = (b * a.heads + r) * a.rows + begin;
    const A* stats = static_cast<const A*>(a.stats) + (b * a.heads + r) * 2;
    const bool nothing = stats[1] == A(0);
    const V largest = V::set1(stats[0]), sum = V::set1(stats[1]);
    const A* logits = static_cast<const A*>(a.logits) + row;
    S* weights = static_cast<S*>(a.weights) + row;
    for_each_vec<V>(end - begin, [&](int64_t i, auto part) {
      store(nothing ? V::zero() : exp(load<V>(logits + i, part) - largest) / sum, weights + i, part);
    });
  }
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
