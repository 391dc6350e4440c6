// Gradients of topk_read, with w the weights and g[i] = w[i] scale (dread . value[i] + dweights[i] - their mean over
// w):
//
//   dot     dquery = sum_i g[i] k[i]                                       dkey[n] = sum g q
//   l2      dquery = 2 (sum_i g[i] k[i] - q sum_i g[i])                    dkey[n] = 2 (sum g q - k sum g)
//   cosine  dquery = sum_i g[i] k[i] / (|q| |k|) - q sum_i g[i] s[i] / |q|^2, dkey[n] alike; dvalue[n] = sum w dread
//
// The sums of a memory row go over whoever chose it, by an inverse index. Scores are computed again from the chosen
// rows, which dquery needs in any case.
#pragma once

namespace mk::cpu::MK_LEVEL {
namespace {

constexpr int kTopkNumbers = 3;

template <class A>
struct GradientScratch {
  A *query, *dread, *dquery, *scores, *weights, *squares, *products;
  int64_t* slot;
  int32_t* index;
  int64_t used;

  GradientScratch(const TopkArgs& a, void* memory) {
    Carver carver(memory);
    const int64_t slots = (a.slots + kTile - 1) / kTile * kTile;
    query = carver.take<A>(a.width), dquery = carver.take<A>(a.width), dread = carver.take<A>(a.value_width);
    scores = carver.take<A>(slots), weights = carver.take<A>(slots);
    squares = carver.take<A>(slots), products = carver.take<A>(slots);
    slot = carver.take<int64_t>(slots), index = carver.take<int32_t>(slots);
    used = carver.used();
  }
};
template <class A>
int64_t topk_gradient_scratch(const TopkArgs& a) {
  return GradientScratch<A>(a, nullptr).used;
}

// Scores of the chosen rows; for the cosine also squares = |k|^2 + eps. Returns |q|^2 + eps there.
template <class A, class T>
A score_chosen(const TopkArgs& a, const GradientScratch<A>& w, int64_t b, int64_t count) {
  using V = Vec<A>;
  if (a.similarity != TopkArgs::cosine) {
    for_chosen<T>(a.key, b, w.index, count, a.width, [&](const Rows<T>& rows, int64_t i) {
      if (a.similarity == TopkArgs::dot) return dot_rows<T, Dot::plain>(rows, 1, w.query, w.scores + i);
      dot_rows<T, Dot::distance>(rows, 1, w.query, w.scores + i);
      for (int64_t j = i; j < i + rows.count; j++) w.scores[j] = -w.scores[j];
    });
    return A(1);
  }
  V sum = V::zero();
  for_each_vec<V>(a.width, [&](int64_t j, auto part) {
    const V x = load<V>(w.query + j, part);
    sum = fma(x, x, sum);
  });
  const A square = reduce_add(sum) + kCosineEps<A>;
  for_chosen<T>(a.key, b, w.index, count, a.width, [&](const Rows<T>& rows, int64_t i) {
    dot_rows<T, Dot::squares>(rows, 1, w.query, w.scores + i, w.squares + i);
  });
  for (int64_t i = 0; i < count; i += V::kLanes) {
    const V squares = V::load(w.squares + i) + V::set1(kCosineEps<A>);
    squares.store(w.squares + i);
    (V::load(w.scores + i) / (sqrt(squares) * sqrt(V::set1(square)))).store(w.scores + i);
  }
  return square;
}

// w.products becomes g.
template <class A, class T>
void score_gradients(const TopkArgs& a, const GradientScratch<A>& w, int64_t b, int64_t q, int64_t count) {
  for (int64_t i = 0; i < count; i++) w.products[i] = 0;
  if (a.dread.data) {
    widen(row_at<T>(a.dread, b, 0, q), a.value_width, w.dread);
    for_chosen<T>(a.value, b, w.index, count, a.value_width,
                  [&](const Rows<T>& rows, int64_t i) { dot_rows<T, Dot::plain>(rows, 1, w.dread, w.products + i); });
  }
  if (a.dweights.data) {
    const T* dweights = row_at<T>(a.dweights, b, 0, q);
    for (int64_t i = 0; i < count; i++) w.products[i] += A(to_float(dweights[w.slot[i]]));
  }
  A mean = 0;
  for (int64_t i = 0; i < count; i++)
    if (w.weights[i] != A(0)) mean += w.weights[i] * w.products[i];
  for (int64_t i = 0; i < count; i++)
    w.products[i] = w.weights[i] == A(0) ? A(0) : A(a.scale) * (w.weights[i] * (w.products[i] - mean));
}

// The factors that each chosen row and the query itself have in dquery; w.scores and w.squares become those that the
// query and the row have in dkey.
template <class A>
A factors(const TopkArgs& a, const GradientScratch<A>& w, int64_t count, A square, A* of_rows) {
  A own = 0;
  if (a.similarity == TopkArgs::dot) {
    for (int64_t i = 0; i < count; i++) of_rows[i] = w.scores[i] = w.products[i], w.squares[i] = 0;
  } else if (a.similarity == TopkArgs::l2) {
    for (int64_t i = 0; i < count; i++) {
      of_rows[i] = w.scores[i] = 2 * w.products[i], w.squares[i] = -w.scores[i];
      own -= w.scores[i];
    }
  } else {
    using V = Vec<A>;
    for (int64_t i = 0; i < count; i += V::kLanes) {
      const V g = V::load(w.products + i), s = V::load(w.scores + i), squares = V::load(w.squares + i);
      (V::zero() - g * s / squares).store(w.squares + i);
      (g * s).store(w.products + i);
      (g / (sqrt(squares) * sqrt(V::set1(square)))).store(w.scores + i);
    }
    for (int64_t i = 0; i < count; i++) own -= w.products[i];
    own /= square;
    for (int64_t i = 0; i < count; i++) of_rows[i] = w.scores[i];
  }
  return own;
}

template <class A, class T>
void topk_gradient(const TopkArgs& a, int64_t b, int64_t q, void* scratch) {
  using V = Vec<A>;
  const GradientScratch<A> w(a, scratch);
  const int64_t* index = row_at<int64_t>(a.index, b, 0, q);
  int64_t count = 0;
  for (int64_t i = 0; i < a.slots; i++)
    if (uint64_t(index[i]) < uint64_t(a.rows)) w.slot[count] = i, w.index[count++] = int32_t(index[i]);
  widen(row_at<T>(a.query, b, 0, q), a.width, w.query);
  const A square = score_chosen<A, T>(a, w, b, count);
  for (int64_t i = 0; i < count; i++) w.weights[i] = w.scores[i];
  soften(A(a.scale), count, w.weights);
  score_gradients<A, T>(a, w, b, q, count);
  const A own = factors(a, w, count, square, w.products);
  const int64_t at = b * a.queries + q;
  if (a.given) {
    A* given = static_cast<A*>(a.given) + at * a.slots * kTopkNumbers;
    for (int64_t i = 0; i < a.slots * kTopkNumbers; i++) given[i] = 0;
    for (int64_t i = 0; i < count; i++) {
      A* to = given + w.slot[i] * kTopkNumbers;
      to[0] = w.weights[i], to[1] = w.scores[i], to[2] = w.squares[i];
    }
  }
  if (!a.dquery) return;
  int64_t heavy = 0;
  for (int64_t i = 0; i < count; i++) {
    w.products[heavy] = w.products[i], w.index[heavy] = w.index[i];
    heavy += w.weights[i] != A(0);
  }
  for_each_vec<V>(a.width, [&](int64_t j, auto part) {
    store(own == A(0) ? V::zero() : V::set1(own) * load<V>(w.query + j, part), w.dquery + j, part);
  });
  for_chosen<T>(a.key, b, w.index, heavy, a.width,
                [&](const Rows<T>& rows, int64_t i) { add_rows(rows, 1, w.products + i, w.dquery); });
  T* dquery = static_cast<T*>(a.dquery) + at * a.width;
  for_each_vec<V>(a.width, [&](int64_t j, auto part) { store(load<V>(w.dquery + j, part), dquery + j, part); });
}

template <class A>
int64_t topk_memory_scratch(const TopkArgs& a, int64_t rows) {
  Carver carver(nullptr);
  carver.take<int64_t>(rows + 1);
  carver.take<Given<A, kTopkNumbers>>(a.queries * a.slots);
  return carver.used();
}

// Gradients of memory rows [first, last) of entry b.
template <class A, class T>
void topk_memory(const TopkArgs& a, int64_t b, int64_t first, int64_t last, void* scratch) {
  using G = Given<A, kTopkNumbers>;
  Carver carver(scratch);
  int64_t* start = carver.take<int64_t>(last - first + 1);
  G* given = carver.take<G>(a.queries * a.slots);
  const A* numbers = static_cast<const A*>(a.given) + b * a.queries * a.slots * kTopkNumbers;
  invert<A, kTopkNumbers>({a.index, b, 0, 1, a.queries, a.slots, numbers}, first, last, start, given);
  T *dkey = static_cast<T*>(a.dkey) + (b * a.rows + first) * a.width,
    *dvalue = static_cast<T*>(a.dvalue) + (b * a.rows + first) * a.value_width;
  for (int64_t row = 0, from = 0; row < last - first; from = start[row++]) {
    const int64_t count = start[row] - from;
    if (a.dkey) {
      A own = 0;
      for (int64_t i = from; i < from + count; i++) own += given[i].number[2];
      const T* key = own == A(0) ? nullptr : row_at<T>(a.key, b, 0, first + row);
      write_memory_row<A, T, 1>(a.query, b, given + from, count, a.width, A(1), dkey + row * a.width, key, own);
    }
    if (a.dvalue)
      write_memory_row<A, T, 0>(a.dread, b, given + from, a.dread.data ? count : 0, a.value_width, A(1),
                                dvalue + row * a.value_width);
  }
}

template <class A>
int64_t pair_bytes() {
  return sizeof(Pair<A>);
}

}  // namespace

#define MK_TOPK_SIZES(function) \
  { function<double>, function<float>, function<float>, function<float> }
#define MK_TOPK_TYPES(function) \
  { function<double, double>, function<float, float>, function<float, bfloat16>, function<float, float16> }
const TopkKernels topk_read = {
    MK_TOPK_SIZES(pair_bytes),          MK_TOPK_SIZES(topk_search_scratch), MK_TOPK_TYPES(topk_search),
    MK_TOPK_SIZES(topk_finish_scratch), MK_TOPK_TYPES(topk_finish),         MK_TOPK_SIZES(topk_gradient_scratch),
    MK_TOPK_TYPES(topk_gradient),       MK_TOPK_SIZES(topk_memory_scratch), MK_TOPK_TYPES(topk_memory)};

}  // namespace mk::cpu::MK_LEVEL
