// Retrieved memories of each query, joined with the local part of its softmax.
//
//   r[i] = scale q . memory_key[index[i]] + bias[i], m = max(base of the local part, r),
//   out = (exp(base - m) local sums + sum_i exp(r[i] - m) memory_value[index[i]]) / (the same without the values)
//
// Backward, with the joint base and unit: p[i] = unit exp(r[i] - base), ds[i] = p[i] (dout . memory_value - delta),
// dquery += scale ds memory_key; then each memory row sums p dout and scale ds q over an inverse index, made by
// counting. Rows are read in place, forward 2 a retrieval, backward 2 (dout, q and the pair (p, ds) of a row come from
// the cache): a query's own rows are worked on while those of the next one are on their way. Everything in the
// accumulation type A.
#pragma once
#include "cpu/generic/inverse_index.inl.h"
#include "cpu/retrieval_attention.h"

namespace mk::cpu::MK_LEVEL {
namespace {

template <class A>
struct RetrievalScratch {
  A *query, *dout, *sums, *scores, *products;
  int64_t *slot, *row;  // of the memories that are there
  int64_t used;

  RetrievalScratch(const RetrievalArgs& r, void* memory) {
    Carver carver(memory);
    query = carver.take<A>(r.width);
    dout = carver.take<A>(r.value_width);
    sums = carver.take<A>(r.value_width);
    scores = carver.take<A>(padded<A>(r.slots));
    products = carver.take<A>(padded<A>(r.slots));
    slot = carver.take<int64_t>(r.slots);
    row = carver.take<int64_t>(r.slots);
    used = carver.used();
  }
};
template <class A>
int64_t retrieval_scratch(const RetrievalArgs& r) {
  return RetrievalScratch<A>(r, nullptr).used;
}

// The memories of one query, and where the rows of the next one lie.
template <class T>
struct Retrieved {
  const T *keys, *values;
  const int64_t* next;   // indices of the next query; null: there is none
  const int64_t* later;  // and of the one after that
  int64_t count;         // of w.slot and w.row

  template <class A>
  Retrieved(const RetrievalArgs& r, const RetrievalScratch<A>& w, int64_t b, int64_t h, int64_t query, int64_t end)
      : count(0) {
    const int64_t shared = h / (r.heads / r.key_heads);
    keys = row_at<T>(r.memory_key, b, shared, 0), values = row_at<T>(r.memory_value, b, shared, 0);
    const int64_t* index = row_at<int64_t>(r.index, b, h, query);
    next = query + 1 < end ? index + r.index.row : nullptr;
    later = query + 2 < end ? index + 2 * r.index.row : nullptr;
    for (int64_t i = 0; i < r.slots; i++)
      if (uint64_t(index[i]) < uint64_t(r.rows)) w.slot[count] = i, w.row[count] = index[i], count++;
  }
  // The row that slot i of the next query names, into the L2 cache; and the first line of the one that the query after
  // it does, whose page must be looked up.
  MK_INLINE void fetch(const RetrievalArgs& r, int64_t i, const T* rows, int64_t stride, int64_t width) const {
    if (later && uint64_t(later[i]) < uint64_t(r.rows)) __builtin_prefetch(rows + later[i] * stride, 0, 2);
    if (!next || uint64_t(next[i]) >= uint64_t(r.rows)) return;
    const char* row = reinterpret_cast<const char*>(rows + next[i] * stride);
    for (int64_t byte = 0; byte < width * int64_t(sizeof(T)); byte += 64) __builtin_prefetch(row + byte, 0, 2);
  }
};

// out[i] = vector . row w.row[i]; whole vectors of `out` are written.
template <class A, class T>
void dot_retrieved(const RetrievalArgs& r, const RetrievalScratch<A>& w, const Retrieved<T>& found, const T* rows,
                   int64_t stride, int64_t width, const A* vector, A* out) {
  using V = Vec<A>;
  constexpr int64_t L = V::kLanes;
  alignas(64) A lanes[L * L];
  for (int64_t i = 0; i < L * L; i += L) V::zero().store(lanes + i);
  for (int64_t first = 0; first < found.count; first += L) {
    for (int64_t i = first; i < smaller(first + L, found.count); i++) {
      found.fetch(r, i, rows, stride, width);
      const T* row = rows + w.row[i] * stride;
      V sum = V::zero();
      for_each_vec<V>(width,
                      [&](int64_t j, auto part) { sum = fma(load<V>(vector + j, part), load<V>(row + j, part), sum); });
      sum.store(lanes + (i - first) * L);
    }
    reduce_add_each(lanes).store(out + first);
  }
  for (int64_t i = found.count; i < r.slots; i++) found.fetch(r, i, rows, stride, width);
}

// sums[j] += sum_i weights[i] row[j]; rows of weight 0 are left out, whatever they hold.
template <class A, class T>
void add_retrieved(const RetrievalArgs& r, const RetrievalScratch<A>& w, const Retrieved<T>& found, const T* rows,
                   int64_t stride, int64_t width, const A* weights, bool fetching, A* sums) {
  using V = Vec<A>;
  const auto columns = [&](int64_t j, auto part, auto vectors) {
    constexpr int N = decltype(vectors)::value;
    V sum[N];
    for (int l = 0; l < N; l++) sum[l] = load<V>(sums + j + l * V::kLanes, part);
    for (int64_t i = 0; i < found.count; i++) {
      if (fetching) found.fetch(r, i, rows + j, stride, N * V::kLanes);
      if (weights[i] == A(0)) continue;
      const V weight = V::set1(weights[i]);
      const T* row = rows + w.row[i] * stride + j;
      for (int l = 0; l < N; l++) sum[l] = fma(weight, load<V>(row + l * V::kLanes, part), sum[l]);
    }
    for (int l = 0; l < N; l++) store(sum[l], sums + j + l * V::kLanes, part);
  };
  int64_t j = 0;
  for (; j + 4 * V::kLanes <= width; j += 4 * V::kLanes) columns(j, Full{}, Vectors<4>{});
  for (; j + V::kLanes <= width; j += V::kLanes) columns(j, Full{}, Vectors<1>{});
  if (j < width) columns(j, Tail{width - j}, Vectors<1>{});
}

// Scores of the memories of w.slot, -inf where the bias says so.
template <class A, class T>
void score_retrieved(const RetrievalArgs& r, const RetrievalScratch<A>& w, const Retrieved<T>& found, int64_t b,
                     int64_t h, int64_t query) {
  using V = Vec<A>;
  dot_retrieved(r, w, found, found.keys, r.memory_key.row, r.width, w.query, w.scores);
  const V scale = V::set1(A(r.scale));
  for (int64_t i = 0; i < found.count; i += V::kLanes) (V::load(w.scores + i) * scale).store(w.scores + i);
  if (!r.bias.data) return;
  const T* bias = row_at<T>(r.bias, b, h, query);
  for (int64_t i = 0; i < found.count; i++) {
    const A shift = to_float(bias[w.slot[i]]);
    w.scores[i] = shift == -kInfinity<A> ? shift : w.scores[i] + shift;
  }
}

// Base and sum of the softmax over the local part and the scores, which become weights; returns what the local sums are
// multiplied by. The order of `>` and the largest score's own NaN keep what is not a number in the sum.
template <class A>
A join(const RetrievalScratch<A>& w, int64_t count, A& base, A& total) {
  using V = Vec<A>;
  const A old = base;
  for (int64_t i = 0; i < count; i++)
    if (w.scores[i] > base) base = w.scores[i];
  const V zero = V::set1(base == -kInfinity<A> ? A(0) : base), one = V::set1(A(1));
  A shrink[kLanes<A>];
  power_of(V::set1(old), one, zero).store(shrink);
  if (base == old) shrink[0] = 1;  // power(0) is not exactly 1
  for (int64_t i = 0; i < count; i += kLanes<A>) power_of(V::load(w.scores + i), one, zero).store(w.scores + i);
  A sum = 0;
  for (int64_t i = 0; i < count; i++) sum += w.scores[i];
  total = total * shrink[0] + sum;
  return shrink[0];
}

template <class A, class T>
void retrieval_forward(const RetrievalArgs& r, int64_t b, int64_t h, int64_t begin, int64_t end, void* memory) {
  using V = Vec<A>;
  const RetrievalScratch<A> w(r, memory);
  const int64_t local_row = padded<A>(r.value_width);
  const A *parts = static_cast<const A*>(r.local), *bases = parts + r.queries * local_row, *totals = bases + r.queries;
  for (int64_t query = begin; query < end; query++) {
    const Retrieved<T> found(r, w, b, h, query, end);
    widen(row_at<T>(r.query, b, h, query), r.width, w.query);
    score_retrieved<A, T>(r, w, found, b, h, query);
    A base = bases[query], total = totals[query];
    const A shrink = join<A>(w, found.count, base, total);
    const A* local = parts + query * local_row;
    for_each_vec<V>(r.value_width,
                    [&](int64_t j, auto part) { store(load<V>(local + j, part) * V::set1(shrink), w.sums + j, part); });
    add_retrieved(r, w, found, found.values, r.memory_value.row, r.value_width, w.scores, true, w.sums);
    const int64_t row = (b * r.heads + h) * r.queries + query;
    T* out = static_cast<T*>(r.out) + row * r.value_width;
    const V factor = V::set1(total == A(0) ? A(0) : A(1) / total);
    for_each_vec<V>(r.value_width,
                    [&](int64_t j, auto part) { store(load<V>(w.sums + j, part) * factor, out + j, part); });
    static_cast<A*>(r.lse)[row] = total == A(0) ? -kInfinity<A> : A(double(base) + __builtin_log(double(total)));
    A* stats = static_cast<A*>(r.stats) + 2 * row;
    stats[0] = base, stats[1] = total;
  }
}

template <class A, class T>
void rejoin(const RetrievalArgs& r, const AttentionArgs& a, int64_t b, int64_t h, int64_t begin, int64_t end,
            void* memory) {
  const RetrievalScratch<A> w(r, memory);
  for (int64_t query = begin; query < end; query++) {
    const int64_t row = (b * r.heads + h) * r.queries + query;
    const A *stats = static_cast<const A*>(a.stats) + 2 * row, limit = A(a.restate_beyond);
    A &base = static_cast<A*>(a.rows_base)[row], &unit = static_cast<A*>(a.rows_unit)[row];
    if (stats[1] == A(0) || !((stats[0] > limit && stats[0] < kInfinity<A>) || stats[0] < -limit)) continue;
    const Retrieved<T> found(r, w, b, h, query, end);
    widen(row_at<T>(r.query, b, h, query), r.width, w.query);
    score_retrieved<A, T>(r, w, found, b, h, query);
    A total = A(1) / unit;
    join<A>(w, found.count, base, total);
    unit = A(1) / total;
  }
}

// w.scores and w.products become weights and ds; returns the exact delta: `delta` and by how much these memories and
// the local keys (moved: their two sums; null: it is exact already) say it is off, see center(). One memory alone has
// weight 1 whatever its score: no gradient but that of the log-sum-exp, exactly.
template <class A>
A retrieved_gradients(const RetrievalScratch<A>& w, int64_t count, A base, A unit, A delta, const A* moved, A dlse,
                      bool whole) {
  using V = Vec<A>;
  const V zero = V::set1(base), one = V::set1(A(1));
  for (int64_t i = 0; i < count; i += kLanes<A>)
    (power_of(V::load(w.scores + i), one, zero) * V::set1(unit)).store(w.scores + i);
  int64_t there = 0;
  A sum = moved ? moved[0] : A(0), total = moved ? moved[1] : A(0);
  for (int64_t i = 0; i < count; i++) {
    if (w.scores[i] == A(0))
      w.products[i] = 0;
    else
      there++, total += w.scores[i], sum += w.scores[i] * (w.products[i] - (delta + dlse));
  }
  if (moved && total != A(0)) delta += sum / total;
  for (int64_t i = 0; i < count; i++)
    if (w.scores[i] != A(0)) w.products[i] = w.scores[i] * (whole && there == 1 ? dlse : w.products[i] - delta);
  return delta;
}

// What the memories give to dquery of a row, until the local keys have given theirs: dquery itself holds it if it can.
template <class A, class T>
MK_INLINE A* memory_sums(const RetrievalArgs& r, const AttentionArgs& a, int64_t row) {
  if (sizeof(T) == sizeof(A)) return static_cast<A*>(a.dquery) + row * r.width;
  return static_cast<A*>(a.dquery_sums) + (r.batch * r.heads * r.queries + row) * padded<A>(r.width);
}

template <class A, class T>
void retrieval_finish(const RetrievalArgs& r, const AttentionArgs& a, int64_t begin, int64_t end) {
  using V = Vec<A>;
  for (int64_t i = begin; i < end; i++) {
    const A *local = static_cast<const A*>(a.dquery_sums) + i * padded<A>(r.width), *sums = memory_sums<A, T>(r, a, i);
    T* dquery = static_cast<T*>(a.dquery) + i * r.width;
    for_each_vec<V>(r.width, [&](int64_t j, auto part) {
      store((V::load(local + j) + load<V>(sums + j, part)) * V::set1(A(r.scale)), dquery + j, part);
    });
  }
}

template <class A, class T>
void retrieval_gradient(const RetrievalArgs& r, const AttentionArgs& a, int64_t b, int64_t h, int64_t begin,
                        int64_t end, void* memory) {
  const RetrievalScratch<A> w(r, memory);
  for (int64_t query = begin; query < end; query++) {
    const int64_t row = (b * r.heads + h) * r.queries + query;
    const Retrieved<T> found(r, w, b, h, query, end);
    widen(row_at<T>(r.query, b, h, query), r.width, w.query);
    score_retrieved<A, T>(r, w, found, b, h, query);
    if (r.dout.data) {
      widen(row_at<T>(r.dout, b, h, query), r.value_width, w.dout);
      dot_retrieved(r, w, found, found.values, r.memory_value.row, r.value_width, w.dout, w.products);
    } else {
      for (int64_t i = 0; i < found.count; i++) w.products[i] = 0;
    }
    const Range local = seen_by(a, query);
    A* delta = static_cast<A*>(a.rows_delta) + row;
    const A* moved = a.rows_moved ? static_cast<const A*>(a.rows_moved) + 2 * row : nullptr;
    *delta = retrieved_gradients<A>(w, found.count, static_cast<const A*>(a.rows_base)[row],
                                    static_cast<const A*>(a.rows_unit)[row], *delta,
                                    moved && moved[1] >= A(0) ? moved : nullptr,
                                    r.dlse.data ? *row_at<A>(r.dlse, b, h, query) : A(0), local.first >= local.last);
    if (a.dquery) {
      A* sums = memory_sums<A, T>(r, a, row);
      for (int64_t j = 0; j < r.width; j++) sums[j] = 0;
      add_retrieved(r, w, found, found.keys, r.memory_key.row, r.width, w.products, false, sums);
    }
    if (r.retrieved) {
      A* pairs = static_cast<A*>(r.retrieved) + ((b * r.heads + h - r.first_head) * r.queries + query) * r.slots * 2;
      for (int64_t i = 0; i < 2 * r.slots; i++) pairs[i] = 0;
      for (int64_t i = 0; i < found.count; i++)
        pairs[2 * w.slot[i]] = w.scores[i], pairs[2 * w.slot[i] + 1] = w.products[i];
    }
    if (!r.dbias) continue;
    T* dbias = static_cast<T*>(r.dbias) + row * r.slots;
    for (int64_t i = 0; i < r.slots; i++) dbias[i] = convert<T>::from(A(0));
    for (int64_t i = 0; i < found.count; i++) dbias[w.slot[i]] = convert<T>::from(w.products[i]);
  }
}

// The inverse index of `rows` memory rows; C: what counts the retrievals of a key head.
template <class C>
struct Inverse {
  C* start;
  C* number;
  int64_t used;

  Inverse(const RetrievalArgs& r, int64_t rows, void* memory) {
    Carver carver(memory);
    start = carver.take<C>(rows + 1);
    number = carver.take<C>(r.heads / r.key_heads * r.queries * r.slots);
    used = carver.used();
  }
};
// It is most of the scratch of few retrievals.
MK_INLINE bool counts_fit(const RetrievalArgs& r) { return r.heads / r.key_heads * r.queries * r.slots <= INT32_MAX; }
int64_t retrieval_memory_scratch(const RetrievalArgs& r, int64_t rows) {
  return counts_fit(r) ? Inverse<int32_t>(r, rows, nullptr).used : Inverse<int64_t>(r, rows, nullptr).used;
}

template <class A, class T, class C>
void write_memory_rows(const RetrievalArgs& r, int64_t b, int64_t h, int64_t first, int64_t last, void* memory) {
  const int64_t group = r.heads / r.key_heads;
  const Inverse<C> inverse(r, last - first, memory);
  const A* pairs = static_cast<const A*>(r.retrieved) + (b * r.heads - r.first_head) * r.queries * r.slots * 2;
  const Retrievals<A> retrievals{r.index, b, h * group, (h + 1) * group, r.queries, r.slots, pairs};
  invert<A, 2>(retrievals, first, last, inverse.start, inverse.number);
  const int64_t offset = (b * r.key_heads + h) * r.rows + first;
  T *dkey = static_cast<T*>(r.dmemory_key) + offset * r.width,
    *dvalue = static_cast<T*>(r.dmemory_value) + offset * r.value_width;
  const int64_t all_rows = r.batch * r.key_heads * r.rows;
  const bool stream_key = past_caches<A, T>(r.dmemory_key, all_rows, r.width);
  const bool stream_value = past_caches<A, T>(r.dmemory_value, all_rows, r.value_width);
  for (int64_t row = 0, from = 0; row < last - first; row++) {
    const int64_t count = inverse.start[row] - from;
    const Numbered<A, 2, C> own{retrievals, inverse.number + from};
    from = inverse.start[row];
    const int64_t values = r.dout.data ? count : 0;
    if (r.dmemory_key && (count || !r.key_cleared))  // no factor for nothing: it may be negative
      write_memory_row<A, T, 1>(r.query, b, own, count, r.width, A(count ? r.scale : 1), dkey + row * r.width, nullptr,
                                A(0), stream_key);
    if (r.dmemory_value && (values || !r.value_cleared))
      write_memory_row<A, T, 0>(r.dout, b, own, values, r.value_width, A(1), dvalue + row * r.value_width, nullptr,
                                A(0), stream_value);
  }
}

template <class A, class T>
void retrieval_memory(const RetrievalArgs& r, int64_t b, int64_t h, int64_t first, int64_t last, void* memory) {
  (counts_fit(r) ? write_memory_rows<A, T, int32_t> : write_memory_rows<A, T, int64_t>)(r, b, h, first, last, memory);
}

}  // namespace

#define MK_RETRIEVAL_TYPES(function) \
  { function<double, double>, function<float, float>, function<float, bfloat16>, function<float, float16> }
const RetrievalKernels retrieval_attention = {
    {retrieval_scratch<double>, retrieval_scratch<float>, retrieval_scratch<float>, retrieval_scratch<float>},
    MK_RETRIEVAL_TYPES(retrieval_forward),
    MK_RETRIEVAL_TYPES(rejoin),
    MK_RETRIEVAL_TYPES(retrieval_gradient),
    MK_RETRIEVAL_TYPES(retrieval_finish),
    retrieval_memory_scratch,
    MK_RETRIEVAL_TYPES(retrieval_memory)};

}  // namespace mk::cpu::MK_LEVEL
