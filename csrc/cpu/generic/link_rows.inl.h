// link_step: L'_ij = (1 - w_i - w_j) L_ij + w_i p_j with diagonal 0; p' = (1 - sum w) p + w; f_r = L' q_r,
// b_r = L'^T q_r. link_read: the same with L' = L, nothing updated. With G = dL' + sum_r (df_r q_r^T + q_r db_r^T) off
// the diagonal:
//
//   dL_ij = (1 - w_i - w_j) G_ij,  dp_j = sum_i w_i G_ij + (1 - sum w) dp'_j,
//   dw_k = sum_j G_kj (p_j - L_kj) - sum_i G_ik L_ik + dp'_k - dp' . p,  dq_r = L'^T df_r + L' db_r
//
// A task owns 128 rows of one matrix and takes four rows at a time, a vector of columns at once: L' is made in
// registers from one read of L, written, and multiplied from both sides at once; row sums (4 heads x 4 rows) stay in
// registers over the columns, column sums in the L1 cache. Backward reads the four rows of L once from memory (G, then
// L' again from the L1 cache: it is cheaper to make than to read). Bytes an element of the matrix: forward 1 read,
// 1 write; backward 2 reads, 1 write. Column sums of the tasks are combined in order. Precision: the accumulation type
// inside (f, b and all gradients are those of L' before it is rounded), rounded once.
#pragma once
#include "cpu/link.h"

namespace mk::cpu::MK_LEVEL {
namespace {

constexpr int kRowsAtOnce = 4, kHeadsAtOnce = 4;

// What a task reads again and again, in the accumulation type; heads lie `padded` apart.
template <class S>
struct LinkTask {
  using A = acc_t<S>;
  const LinkArgs& a;
  int64_t b, h, padded;
  A *write, *precedence, *read, *dforward, *dbackward, *lanes, *row_sums;

  MK_INLINE LinkTask(const LinkArgs& args, int64_t at, void* scratch, bool backward)
      : a(args), b(at / args.heads), h(at % args.heads), padded(link_padded(args)) {
    write = static_cast<A*>(scratch), precedence = write + padded, read = precedence + padded;
    dforward = read + a.read_heads * padded, dbackward = dforward + (backward ? a.read_heads * padded : 0);
    lanes = dbackward + (backward ? a.read_heads * padded : 0);
    row_sums = lanes + (a.read_heads + 1) * kLinkTile * 16;
    if (a.update) {
      widen(a.write, b * a.write_b + h * a.write_h, 0, 1, write);
      widen(a.precedence, b * a.precedence_b + h * a.precedence_h, 0, 1, precedence);
    }
    widen(a.read, b * a.read_b, a.read_r, a.read_heads, read);
    if (!backward) return;
    widen(a.dforward, b * a.dforward_b + h * a.dforward_h, a.dforward_r, a.read_heads, dforward);
    widen(a.dbackward, b * a.dbackward_b + h * a.dbackward_h, a.dbackward_r, a.read_heads, dbackward);
  }
  // Zeros stand for a tensor that is not there.
  void widen(const void* from, int64_t first, int64_t stride, int64_t count, A* to) {
    using V = Vec<A>;
    const S* rows = static_cast<const S*>(from) + first;
    for (int64_t r = 0; r < count; r++)
      for_each_vec<V>(a.rows, [&](int64_t j, auto part) {
        store(from ? load<V>(rows + r * stride + j, part) : V::zero(), to + r * padded + j, part);
      });
  }
};

template <int N>
struct Count {
  static constexpr int value = N;
};
template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

// body(j, part, Flag<may the diagonal of rows [first, first + I) lie in it>) for every vector of columns.
template <class V, int I, class Body>
MK_INLINE void for_each_column(int64_t n, int64_t first, const Body& body) {
  constexpr int64_t L = V::kLanes;
  const int64_t begin = first / L * L, whole = n / L * L;
  const int64_t end = (first + I + L - 1) / L * L < whole ? (first + I + L - 1) / L * L : whole;
  int64_t j = 0;
  for (; j < begin && j < whole; j += L) body(j, Full{}, Flag<false>{});
  for (; j < end; j += L) body(j, Full{}, Flag<true>{});
  for (; j < whole; j += L) body(j, Full{}, Flag<false>{});
  if (j < n) body(j, Tail{n - j}, Flag<true>{});
}

// 0 in lane `at`, if there is such a lane.
template <class V>
MK_INLINE V without_lane(V v, int64_t at) {
  if (at < 0 || at >= V::kLanes) return v;
  return select(V::first_lanes(at + 1) & !V::first_lanes(at), V::zero(), v);
}

// The I rows, two groups on, that are fetched into the L2 cache meanwhile, those to be written too: rows of 2 kB are
// too short for the hardware's prefetcher to follow I of them at once.
template <int I, class S>
MK_INLINE const S* next_rows(const S* rows, int64_t first, int64_t count, int64_t stride) {
  return first + 3 * I <= count ? rows + 2 * I * stride : rows;
}

// sum += v; a few rows are added up before: short sums round less than one long one.
template <class A, class Part>
MK_INLINE void add_to(Vec<A> v, A* sum, Part part) {
  store(load<Vec<A>>(sum, part) + v, sum, part);
}

// Rows [first, first + I): L' from L; with kStore it is written. rows[r][i] = sum_j L'_ij x_r[j] lane by lane (to
// t.lanes), columns_r[j] += sum_i L'_ij y_r[i].
template <class S, int R, int I, bool kUpdate, bool kStore>
void link_products(const LinkTask<S>& t, int64_t first, const acc_t<S>* x, const acc_t<S>* y, acc_t<S>* columns,
                   acc_t<S>* lanes) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const LinkArgs& a = t.a;
  const S* link = static_cast<const S*>(a.link) + t.b * a.link_b + t.h * a.link_h + first * a.link_n;
  constexpr bool kFetch = kStore || !kUpdate;  // in backward of link_step the rows are in the cache
  const S* next = next_rows<I>(link, first, a.rows, a.link_n);
  S* out = kStore ? static_cast<S*>(a.link_new) + ((t.b * a.heads + t.h) * a.rows + first) * a.rows : nullptr;
  const S* next_out = kStore ? next_rows<I>(out, first, a.rows, a.rows) : nullptr;
  A keep[I], write[I];
  V sum[I][R + 1];
  for (int i = 0; i < I; i++) {
    if constexpr (kUpdate) write[i] = t.write[first + i], keep[i] = 1 - write[i];
    for (int r = 0; r < R; r++) sum[i][r] = V::zero();
  }
  for_each_column<V, I>(a.rows, first, [&](int64_t j, auto part, auto diagonal) {
    const V w = kUpdate ? load<V>(t.write + j, part) : V::zero();
    const V p = kUpdate ? load<V>(t.precedence + j, part) : V::zero();
    V right[R + 1], column[R + 1];
    for (int r = 0; r < R; r++) right[r] = load<V>(x + r * t.padded + j, part), column[r] = V::zero();
    for (int i = 0; i < I; i++) {
      V v = load<V>(link + i * a.link_n + j, part);
      if constexpr (kFetch) __builtin_prefetch(next + i * a.link_n + j, 0, 2);
      if constexpr (kUpdate) {
        v = fma(V::set1(keep[i]) - w, v, V::set1(write[i]) * p);
        if constexpr (decltype(diagonal)::value) v = without_lane(v, first + i - j);
      }
      if constexpr (kStore) {
        store(v, out + i * a.rows + j, part);
        __builtin_prefetch(next_out + i * a.rows + j, 1, 2);
      }
      for (int r = 0; r < R; r++) {
        sum[i][r] = fma(v, right[r], sum[i][r]);
        column[r] = fma(V::set1(y[r * t.padded + first + i]), v, column[r]);
      }
    }
    for (int r = 0; r < R; r++) add_to(column[r], columns + r * t.padded + j, part);
  });
  for (int r = 0; r < R; r++)
    for (int i = 0; i < I; i++) sum[i][r].store(lanes + (r * kLinkTile + i) * V::kLanes);
}

// The same for any number of heads, four at a time (for a single row one at a time); the first ones write L'.
template <class S, int I, bool kUpdate, bool kStore>
void link_heads(const LinkTask<S>& t, int64_t first, const acc_t<S>* x, const acc_t<S>* y, acc_t<S>* columns,
                acc_t<S>* lanes) {
  constexpr int kMost = I == 1 ? 1 : kHeadsAtOnce;
  const int64_t heads = t.a.read_heads;
  const auto some = [&](int64_t r, auto count, auto write) {
    constexpr int R = decltype(count)::value;
    link_products<S, R, I, kUpdate, decltype(write)::value>(t, first, x + r * t.padded, y + r * t.padded,
                                                            columns + r * t.padded,
                                                            lanes + r * kLinkTile * Vec<acc_t<S>>::kLanes);
  };
  const auto most = [&](int64_t r, auto write) {
    if (kMost == 1 || heads - r == 1) return some(r, Count<1>{}, write);
    if constexpr (kMost > 1) {
      if (heads - r == 2) return some(r, Count<2>{}, write);
      if (heads - r == 3) return some(r, Count<3>{}, write);
      some(r, Count<4>{}, write);
    }
  };
  if (heads)
    most(0, Flag<kStore>{});
  else if constexpr (kStore)
    some(0, Count<0>{}, Flag<true>{});
  for (int64_t r = kMost; r < heads; r += kMost) most(r, Flag<false>{});
}

// Rows of a tile, four at a time and then one by one: body(first row, Count of rows).
template <class Body>
MK_INLINE void for_each_rows(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + kRowsAtOnce <= end; i += kRowsAtOnce) body(i, Count<kRowsAtOnce>{});
  for (; i < end; i++) body(i, Count<1>{});
}

template <class S, bool kUpdate>
void link_forward_rows(const LinkTask<S>& t, int64_t begin, int64_t end, acc_t<S>* columns) {
  using V = Vec<acc_t<S>>;
  const LinkArgs& a = t.a;
  for (int64_t tile = begin; tile < end; tile += kLinkTile) {
    const int64_t last = tile + kLinkTile < end ? tile + kLinkTile : end;
    for_each_rows(tile, last, [&](int64_t i, auto count) {
      link_heads<S, decltype(count)::value, kUpdate, kUpdate>(t, i, t.read, t.read, columns,
                                                              t.lanes + (i - tile) * V::kLanes);
    });
    for (int64_t r = 0; r < a.read_heads; r++) {
      S* out = static_cast<S*>(a.forward) + ((t.b * a.read_heads + r) * a.heads + t.h) * a.rows + tile;
      for_each_vec<V>(last - tile, [&](int64_t i, auto part) {
        store(reduce_add_each(t.lanes + (r * kLinkTile + i) * V::kLanes), out + i, part);
      });
    }
  }
}

template <class S>
void link_forward(const LinkArgs& a, int64_t at, int64_t begin, int64_t end, void* partial, void* scratch) {
  const LinkTask<S> t(a, at, scratch, false);
  acc_t<S>* columns = static_cast<acc_t<S>*>(partial);
  for (int64_t i = 0; i < link_partial(a, false); i++) columns[i] = 0;
  a.update ? link_forward_rows<S, true>(t, begin, end, columns) : link_forward_rows<S, false>(t, begin, end, columns);
}

template <class A>
MK_INLINE Vec<A> sum_chunks(const A* first, int64_t slot, int64_t chunks, int64_t j) {
  Vec<A> sum = Vec<A>::zero();
  for (int64_t c = 0; c < chunks; c++) sum = sum + Vec<A>::load(first + c * slot + j);
  return sum;
}

// sum_j x_j y_j, or sum_j x_j with y null.
template <class S>
acc_t<S> dot(const S* x, const S* y, int64_t n) {
  using V = Vec<acc_t<S>>;
  V sum = V::zero();
  for_each_vec<V>(n, [&](int64_t j, auto part) {
    const V v = load<V>(x + j, part);
    sum = y ? fma(v, load<V>(y + j, part), sum) : sum + v;
  });
  return reduce_add(sum);
}

template <class S>
void link_combine_forward(const LinkArgs& a, int64_t at, const void* partials, int64_t chunks) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const int64_t b = at / a.heads, h = at % a.heads, padded = link_padded(a), slot = link_partial(a, false);
  for (int64_t r = 0; r < a.read_heads; r++) {
    const A* sums = static_cast<const A*>(partials) + r * padded;
    S* out = static_cast<S*>(a.backward) + ((b * a.read_heads + r) * a.heads + h) * a.rows;
    for_each_vec<V>(a.rows, [&](int64_t j, auto part) { store(sum_chunks(sums, slot, chunks, j), out + j, part); });
  }
  if (!a.update) return;
  const S* write = static_cast<const S*>(a.write) + b * a.write_b + h * a.write_h;
  const S* precedence = static_cast<const S*>(a.precedence) + b * a.precedence_b + h * a.precedence_h;
  const V rest = V::set1(1 - dot<S>(write, nullptr, a.rows));
  S* out = static_cast<S*>(a.precedence_new) + at * a.rows;
  for_each_vec<V>(a.rows, [&](int64_t j, auto part) {
    store(fma(rest, load<V>(precedence + j, part), load<V>(write + j, part)), out + j, part);
  });
}

// Rows [first, first + I): G, and what of the gradients it alone decides. Column sums: dwrite[j] += sum_i G_ij L_ij,
// dprecedence[j] += sum_i w_i G_ij; row sums of G_ij (L_ij - p_j) go to `lanes`.
template <class S, int I, bool kUpdate>
void link_gradient(const LinkTask<S>& t, int64_t first, acc_t<S>* dwrite, acc_t<S>* dprecedence, acc_t<S>* lanes) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const LinkArgs& a = t.a;
  const S* link = static_cast<const S*>(a.link) + t.b * a.link_b + t.h * a.link_h + first * a.link_n;
  const S *dnew = static_cast<const S*>(a.dnew), *next = next_rows<I>(link, first, a.rows, a.link_n), *next_d = nullptr;
  if (dnew) {
    dnew += t.b * a.dnew_b + t.h * a.dnew_h + first * a.dnew_n;
    next_d = next_rows<I>(dnew, first, a.rows, a.dnew_n);
  }
  S* dlink = static_cast<S*>(a.dlink);
  if (dlink) dlink += ((t.b * a.heads + t.h) * a.rows + first) * a.rows;
  const S* next_out = dlink ? next_rows<I>(dlink, first, a.rows, a.rows) : nullptr;
  A keep[I], write[I];
  V sum[I];
  for (int i = 0; i < I; i++) {
    if constexpr (kUpdate) write[i] = t.write[first + i], keep[i] = 1 - write[i];
    sum[i] = V::zero();
  }
  for_each_column<V, I>(a.rows, first, [&](int64_t j, auto part, auto diagonal) {
    V g[I];
    for (int i = 0; i < I; i++) {
      g[i] = dnew ? load<V>(dnew + i * a.dnew_n + j, part) : V::zero();
      if (dnew) __builtin_prefetch(next_d + i * a.dnew_n + j, 0, 2);
    }
    for (int64_t r = 0; r < a.read_heads; r++) {
      const A *read = t.read + r * t.padded, *dforward = t.dforward + r * t.padded, *db = t.dbackward + r * t.padded;
      const V q = load<V>(read + j, part), back = load<V>(db + j, part);
      for (int i = 0; i < I; i++)
        g[i] = fma(V::set1(dforward[first + i]), q, fma(V::set1(read[first + i]), back, g[i]));
    }
    if constexpr (kUpdate) {
      const V w = load<V>(t.write + j, part), p = load<V>(t.precedence + j, part);
      V dw = V::zero(), dp = V::zero();
      for (int i = 0; i < I; i++) {
        V old = load<V>(link + i * a.link_n + j, part);
        __builtin_prefetch(next + i * a.link_n + j, 0, 2);
        if constexpr (decltype(diagonal)::value)
          g[i] = without_lane(g[i], first + i - j), old = without_lane(old, first + i - j);
        if (dlink) {
          store((V::set1(keep[i]) - w) * g[i], dlink + i * a.rows + j, part);
          __builtin_prefetch(next_out + i * a.rows + j, 1, 2);
        }
        sum[i] = fma(g[i], old - p, sum[i]);
        dw = fma(g[i], old, dw);
        dp = fma(V::set1(write[i]), g[i], dp);
      }
      add_to(dw, dwrite + j, part);
      add_to(dp, dprecedence + j, part);
    } else {
      for (int i = 0; i < I; i++) store(g[i], dlink + i * a.rows + j, part);
    }
  });
  for (int i = 0; i < I; i++) sum[i].store(lanes + i * V::kLanes);
}

// sums[i] += the sum of the lanes of row i of a tile.
template <class A>
MK_INLINE void add_lanes(const A* lanes, int64_t rows, A* sums) {
  using V = Vec<A>;
  for_each_vec<V>(rows, [&](int64_t i, auto part) {
    store(load<V>(sums + i, part) + reduce_add_each(lanes + i * V::kLanes), sums + i, part);
  });
}

template <class S, bool kUpdate>
void link_backward_rows(const LinkTask<S>& t, int64_t begin, int64_t end, acc_t<S>* partial) {
  using V = Vec<acc_t<S>>;
  const LinkArgs& a = t.a;
  acc_t<S>*dread = partial, *dwrite = dread + a.read_heads * t.padded, *dprecedence = dwrite + t.padded;
  acc_t<S>* own = t.lanes + a.read_heads * kLinkTile * V::kLanes;
  const bool gradient = a.dlink || (kUpdate && (a.dwrite || a.dprecedence));
  for (int64_t tile = begin; tile < end; tile += kLinkTile) {
    const int64_t last = tile + kLinkTile < end ? tile + kLinkTile : end;
    for_each_rows(tile, last, [&](int64_t i, auto count) {
      constexpr int I = decltype(count)::value;
      const int64_t at = (i - tile) * V::kLanes;
      if (gradient) link_gradient<S, I, kUpdate>(t, i, dwrite, dprecedence, own + at);
      if (a.dread) link_heads<S, I, kUpdate, false>(t, i, t.dbackward, t.dforward, dread, t.lanes + at);
    });
    if (a.dread)
      for (int64_t r = 0; r < a.read_heads; r++)
        add_lanes(t.lanes + r * kLinkTile * V::kLanes, last - tile, dread + r * t.padded + tile);
    if (kUpdate && gradient) add_lanes(own, last - tile, dwrite + tile);
  }
}

template <class S>
void link_backward(const LinkArgs& a, int64_t at, int64_t begin, int64_t end, void* partial, void* scratch) {
  const LinkTask<S> t(a, at, scratch, true);
  acc_t<S>* sums = static_cast<acc_t<S>*>(partial);
  for (int64_t i = 0; i < link_partial(a, true); i++) sums[i] = 0;
  a.update ? link_backward_rows<S, true>(t, begin, end, sums) : link_backward_rows<S, false>(t, begin, end, sums);
}

template <class S>
void link_combine_head(const LinkArgs& a, int64_t b, int64_t h, const acc_t<S>* sums, int64_t slot, int64_t chunks) {
  using V = Vec<acc_t<S>>;
  const int64_t at = b * a.heads + h, padded = link_padded(a);
  const S* write = static_cast<const S*>(a.write) + b * a.write_b + h * a.write_h;
  const S* precedence = static_cast<const S*>(a.precedence) + b * a.precedence_b + h * a.precedence_h;
  const S* d = static_cast<const S*>(a.dprecedence_new);
  if (d) d += b * a.dprecedence_b + h * a.dprecedence_h;
  const V rest = V::set1(1 - dot<S>(write, nullptr, a.rows)), lost = V::set1(d ? dot<S>(d, precedence, a.rows) : 0);
  S *dwrite = static_cast<S*>(a.dwrite), *dprecedence = static_cast<S*>(a.dprecedence);
  for_each_vec<V>(a.rows, [&](int64_t j, auto part) {
    const V upstream = d ? load<V>(d + j, part) : V::zero();
    if (dwrite) store(upstream - lost - sum_chunks(sums, slot, chunks, j), dwrite + at * a.rows + j, part);
    if (dprecedence)
      store(fma(rest, upstream, sum_chunks(sums + padded, slot, chunks, j)), dprecedence + at * a.rows + j, part);
  });
}

// Of one batch entry: the gradient of the read weights is a sum over its matrices.
template <class S>
void link_combine_backward(const LinkArgs& a, int64_t b, const void* partials, int64_t chunks) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const int64_t padded = link_padded(a), slot = link_partial(a, true);
  const A* sums = static_cast<const A*>(partials);
  if (a.dread)
    for (int64_t r = 0; r < a.read_heads; r++) {
      S* out = static_cast<S*>(a.dread) + (b * a.read_heads + r) * a.rows;
      for_each_vec<V>(a.rows, [&](int64_t j, auto part) {
        store(sum_chunks(sums + r * padded, slot, a.heads * chunks, j), out + j, part);
      });
    }
  if (!a.update || !(a.dwrite || a.dprecedence)) return;
  for (int64_t h = 0; h < a.heads; h++)
    link_combine_head<S>(a, b, h, sums + h * chunks * slot + a.read_heads * padded, slot, chunks);
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
