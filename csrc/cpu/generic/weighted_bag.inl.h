// weighted_bag: out[b] = sum_j weight[b][j] table[index[b][j]];  backward: dtable[k] = sum over the places that name k
// of weight dout[b], dweight[b][j] = table[index[b][j]] . dout[b]
//
// Forward gathers rows in place, those of kAheadRows places further on their way to the L2 cache meanwhile, also across
// bags. Backward walks the places sorted by row, so that a row of the table is read once and its gradient written
// once, both in the order of the memory, whatever the number of places that name it; the rows of dout come from the
// cache. Sums of a strip of columns stay in registers for kShort rows and are then added up: short chains of additions
// round less. Bytes: forward one row a place; backward one row read, one written a row that is named. Everything in
// the accumulation type.
#include "cpu/generic/streaming.inl.h"
#include "cpu/weighted_bag.h"

namespace mk::cpu::MK_LEVEL {
namespace {

constexpr int64_t kShort = 16;      // rows that are summed in registers at a time
constexpr int64_t kAheadRows = 12;  // less does not hide the memory, more does not fit the queue of the L2 cache
// Where a row lies in memory is looked up by a fetch of its first line, or the fetches of all its lines would wait for
// that: 5.8 ms with kAheadRows alone, 5.1 with both (131,072 rows of 1 KB out of 268 MB in small pages).
constexpr int64_t kFarRows = 24;
#if defined(__AVX512F__)
constexpr int kStrip = 16;  // vectors of columns in registers
#else
constexpr int kStrip = 8;
#endif

template <int N>
struct Vectors {
  static constexpr int value = N;
};

// Calls body(column, part, vectors) for strips of columns.
template <class A, class Body>
MK_INLINE void for_strips(int64_t width, const Body& body) {
  constexpr int64_t L = Vec<A>::kLanes;
  int64_t j = 0;
  for (; j + kStrip * L <= width; j += kStrip * L) body(j, Full{}, Vectors<kStrip>{});
  for (; j + 4 * L <= width; j += 4 * L) body(j, Full{}, Vectors<4>{});
  for (; j + L <= width; j += L) body(j, Full{}, Vectors<1>{});
  if (j < width) body(j, Tail{width - j}, Vectors<1>{});
}

template <class S>
MK_INLINE void fetch_row(const S* row, int64_t begin, int64_t end) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(S));
  for (int64_t j = begin; j < end; j += kLine) __builtin_prefetch(row + j, 0, 2);
}

// The rows of `count` places and their weights; further ones, up to `ahead`, will be wanted next.
template <class S>
struct Gathered {
  const S* const* row;
  const acc_t<S>* weight;
  int64_t count, ahead;
};

// sum = the sum of kShort rows or fewer, from row `first` on, of a strip of columns.
template <class S, int N, class Part>
MK_INLINE void add_gathered(const Gathered<S>& g, int64_t first, int64_t j, Part part, Vec<acc_t<S>>* sum) {
  using V = Vec<acc_t<S>>;
  constexpr int64_t L = V::kLanes;
  const int64_t last = first + kShort < g.count ? first + kShort : g.count;
  for (int l = 0; l < N; l++) sum[l] = V::zero();
  for (int64_t i = first; i < last; i++) {
    if (!j && i + kFarRows < g.ahead) __builtin_prefetch(g.row[i + kFarRows], 0, 2);
    if (i + kAheadRows < g.ahead) fetch_row(g.row[i + kAheadRows], j, j + N * L);
    const V w = V::set1(g.weight[i]);
    for (int l = 0; l < N; l++) sum[l] = fma(w, load<V>(g.row[i] + j + l * L, part), sum[l]);
  }
}

// to = the weighted sum of the rows; `to` is of the storage type or of the accumulation type.
template <class S, class To>
void sum_gathered(const Gathered<S>& g, int64_t width, acc_t<S>* total, To* to) {
  using A = acc_t<S>;
  using V = Vec<A>;
  constexpr int64_t L = V::kLanes;
  if (g.count == 0) for_each_vec<V>(width, [&](int64_t j, auto part) { store(V::zero(), to + j, part); });
  for (int64_t first = 0; first < g.count; first += kShort) {
    const bool ends = first + kShort >= g.count;
    for_strips<A>(width, [&](int64_t j, auto part, auto vectors) {
      constexpr int N = decltype(vectors)::value;
      V sum[N];
      add_gathered<S, N>(g, first, j, part, sum);
      for (int l = 0; l < N; l++) {
        if (first) sum[l] = load<V>(total + j + l * L, part) + sum[l];
        if (ends)
          store(sum[l], to + j + l * L, part);
        else
          store(sum[l], total + j + l * L, part);
      }
    });
  }
}

// Lists the places of a piece that are there, from `count` on; returns where they end.
template <class S>
int64_t list_places(const BagArgs& a, int64_t piece, int64_t count, const S** row, acc_t<S>* weight) {
  const int64_t b = piece / a.chunks, first = piece % a.chunks * kBagChunk;
  const int64_t last = first + kBagChunk < a.places ? first + kBagChunk : a.places;
  const S* given = static_cast<const S*>(a.weight) + b * a.weight_b;
  for (int64_t j = first; j < last; j++) {
    const int64_t k = a.index[b * a.index_b + j];
    if (k < 0) continue;
    row[count] = static_cast<const S*>(a.table) + k * a.table_k;
    weight[count++] = to_float(given[j]);
  }
  return count;
}

template <class S>
void bag_forward(const BagArgs& a, int64_t begin, int64_t end, void* scratch) {
  using A = acc_t<S>;
  constexpr int64_t kPieces = 256;
  const S** row = static_cast<const S**>(scratch);
  A* weight = reinterpret_cast<A*>(row + kBagChunk);
  A* total = weight + kBagChunk;
  const int64_t places = a.places < 1 ? 1 : a.places < kBagChunk ? a.places : kBagChunk;
  const int64_t at_once = kBagChunk / places < kPieces ? kBagChunk / places : kPieces;
  for (int64_t first = begin; first < end; first += at_once) {
    const int64_t pieces = first + at_once < end ? at_once : end - first;
    int64_t stop[kPieces], count = 0, done = 0;
    for (int64_t i = 0; i < pieces; i++) stop[i] = count = list_places(a, first + i, count, row, weight);
    for (int64_t i = 0; i < pieces; done = stop[i++]) {
      const Gathered<S> own{row + done, weight + done, stop[i] - done, count - done};
      const int64_t at = (first + i) * a.width;
      if (a.chunks == 1)
        sum_gathered(own, a.width, total, static_cast<S*>(a.out) + at);
      else
        sum_gathered(own, a.width, total, static_cast<A*>(a.sums) + at);
    }
  }
}

// to = the sum of `count` rows of sums.
template <class A, class To>
MK_INLINE void join_sums(const A* sums, int64_t count, int64_t width, To* to) {
  using V = Vec<A>;
  for_each_vec<V>(width, [&](int64_t j, auto part) {
    V total = V::zero();
    for (int64_t c = 0; c < count; c++) total = total + load<V>(sums + c * width + j, part);
    store(total, to + j, part);
  });
}

template <class S>
void bag_join(const BagArgs& a, int64_t bag) {
  const acc_t<S>* sums = static_cast<const acc_t<S>*>(a.sums) + bag * a.chunks * a.width;
  join_sums(sums, a.chunks, a.width, static_cast<S*>(a.out) + bag * a.width);
}

// One row with places sorted[begin .. end): its gradient to `to` (null: not wanted), and those of its weights.
// `stream`: past the caches, whole vectors.
template <class S, class To>
void row_gradient(const BagArgs& a, int64_t begin, int64_t end, acc_t<S>* total, To* to, bool stream) {
  using A = acc_t<S>;
  using V = Vec<A>;
  constexpr int64_t L = V::kLanes;
  const S* row = static_cast<const S*>(a.table) + a.sorted[begin].row * a.table_k;
  for (int64_t first = begin; first < end; first += kShort) {
    const int64_t count = first + kShort < end ? kShort : end - first;
    const S* dout[kShort];
    A weight[kShort], product[kShort];
    for (int64_t i = 0; i < count; i++) {
      const int64_t at = a.sorted[first + i].at, b = at / a.places, j = at - b * a.places;
      dout[i] = static_cast<const S*>(a.dout) + b * a.dout_b;
      weight[i] = to_float(static_cast<const S*>(a.weight)[b * a.weight_b + j]);
      product[i] = 0;
    }
    for_strips<A>(a.width, [&](int64_t j, auto part, auto vectors) {
      constexpr int N = decltype(vectors)::value;
      V sum[N];
      for (int l = 0; l < N; l++) sum[l] = V::zero();
      for (int64_t i = 0; i < count; i++) {
        const V w = V::set1(weight[i]);
        if (!a.dweight) {
          for (int l = 0; l < N; l++) sum[l] = fma(w, load<V>(dout[i] + j + l * L, part), sum[l]);
          continue;
        }
        constexpr int kChains = N < 4 ? 1 : 4;  // one would wait for the additions
        V dot[kChains];
        for (int c = 0; c < kChains; c++) dot[c] = V::zero();
        for (int l = 0; l < N; l++) {
          const V d = load<V>(dout[i] + j + l * L, part);
          dot[l % kChains] = fma(d, load<V>(row + j + l * L, part), dot[l % kChains]);
          sum[l] = fma(w, d, sum[l]);
        }
        for (int c = 1; c < kChains; c++) dot[0] = dot[0] + dot[c];
        product[i] += reduce_add(dot[0]);
      }
      if (!to) return;
      for (int l = 0; l < N; l++) {
        if (first > begin) sum[l] = load<V>(total + j + l * L, part) + sum[l];
        if (first + count < end) {
          store(sum[l], total + j + l * L, part);
          continue;
        }
        if constexpr (sizeof(To) == sizeof(A))
          if (stream) {
            sum[l].stream(to + j + l * L);
            continue;
          }
        store(sum[l], to + j + l * L, part);
      }
    });
    if (a.dweight)
      for (int64_t i = 0; i < count; i++)
        static_cast<S*>(a.dweight)[a.sorted[first + i].at] = convert<S>::from(product[i]);
  }
}

template <class S>
void bag_backward(const BagArgs& a, int64_t begin, int64_t end, void* scratch) {
  const bool stream = past_caches<acc_t<S>, S>(a.dtable, a.rows, a.width);
  for (int64_t first = begin; first < end;) {
    const int64_t row = a.sorted[first].row;
    int64_t last = first + 1;
    while (last < end && a.sorted[last].row == row) last++;
    if (a.dweight && last + kAheadRows / 2 < end) {
      const int64_t next = a.sorted[last + kAheadRows / 2].row;
      fetch_row(static_cast<const S*>(a.table) + next * a.table_k, 0, a.width);
    }
    S* to = a.dtable ? static_cast<S*>(a.dtable) + row * a.width : nullptr;
    row_gradient<S>(a, first, last, static_cast<acc_t<S>*>(scratch), to, stream);
    first = last;
  }
}

template <class S>
void bag_backward_run(const BagArgs& a, int64_t begin, int64_t end, void* slot) {
  acc_t<S>* sums = static_cast<acc_t<S>*>(slot);
  row_gradient<S>(a, begin, end, sums, a.dtable ? sums : nullptr, false);
}

template <class S>
void bag_backward_join(const BagArgs& a, int64_t row, const void* slots, int64_t count) {
  join_sums(static_cast<const acc_t<S>*>(slots), count, a.width, static_cast<S*>(a.dtable) + row * a.width);
}

}  // namespace

const BagKernels weighted_bag = {MK_FLOAT_TYPES(bag_forward), MK_FLOAT_TYPES(bag_join), MK_FLOAT_TYPES(bag_backward),
                                 MK_FLOAT_TYPES(bag_backward_run), MK_FLOAT_TYPES(bag_backward_join)};

}  // namespace mk::cpu::MK_LEVEL
