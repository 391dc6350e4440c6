// memory_write: written_i = m_i * prod_h k_h + sum_h w_hi a_h with k_h = 1 - w_hi e_h, element by element; d =
// dwritten, u_h = d m prod_{g != h} k_g:
//
//   dmemory = d prod_h k_h,  dweights_hi = sum_j (d a_h - u_h e_h),  derase_h = -sum_i w_hi u_h,  dadd_h = sum_i w_hi d
//
// A task owns a fixed range of rows of one batch entry. Backward takes tiles of 32 rows and a few columns at a time:
// the sums for derase and dadd stay in registers over the rows, those for dweights lie in the scratch and are reduced
// at the end of the tile. Products of the other heads are prefix times suffix products: exact where a factor is zero.
// Partials of the tasks are combined in order. Bytes per memory element, any number of heads: forward 1 read, 1 write;
// backward 2 reads, 1 write. Precision: the accumulation type inside, rounded once.
#include "cpu/memory_write.h"

namespace mk::cpu::MK_LEVEL {
namespace {

constexpr int kMostHeads = 4;  // more go through the scratch instead of registers

template <class S>
struct WriteRows {
  const S *memory, *d;
  S *written, *dmemory;
  int64_t memory_n, d_n, written_n, width, rows;
  bool more;  // a whole tile follows
};

// weights[h][i] of a tile in the accumulation type, heads kWriteTile apart.
template <class S>
void widen_weights(const MemoryWriteArgs& a, int64_t b, int64_t first, int64_t rows, acc_t<S>* out) {
  using V = Vec<acc_t<S>>;
  const S* weights = static_cast<const S*>(a.weights) + b * a.weights_b + first;
  for (int64_t h = 0; h < a.heads; h++)
    for_each_vec<V>(rows, [&](int64_t i, auto part) {
      store(load<V>(weights + h * a.weights_h + i, part), out + h * kWriteTile + i, part);
    });
}

template <class S>
void widen_heads(const void* from, int64_t stride_b, int64_t stride_h, const MemoryWriteArgs& a, int64_t b,
                 acc_t<S>* to) {
  using V = Vec<acc_t<S>>;
  const S* rows = static_cast<const S*>(from) + b * stride_b;
  for (int64_t h = 0; h < a.heads; h++)
    for_each_vec<V>(a.width, [&](int64_t j, auto part) {
      store(load<V>(rows + h * stride_h + j, part), to + h * a.width + j, part);
    });
}

template <class S, int H, class Part>
MK_INLINE void write_columns(const WriteRows<S>& t, int64_t heads, int64_t j, const acc_t<S>* w, const acc_t<S>* erase,
                             const acc_t<S>* add, int64_t i, Part part) {
  using V = Vec<acc_t<S>>;
  const V one = V::set1(1);
  V kept = one, added = V::zero();
  const int64_t n = H ? H : heads;
  for (int64_t h = 0; h < n; h++) {
    const V weight = V::set1(w[h * kWriteTile + i]), minus = V::set1(-w[h * kWriteTile + i]);
    kept = kept * fma(minus, load<V>(erase + h * t.width + j, part), one);
    added = fma(weight, load<V>(add + h * t.width + j, part), added);
  }
  store(fma(load<V>(t.memory + i * t.memory_n + j, part), kept, added), t.written + i * t.written_n + j, part);
}

template <class S, int H>
void write_tile(const WriteRows<S>& t, int64_t heads, const acc_t<S>* w, const acc_t<S>* erase, const acc_t<S>* add) {
  for (int64_t i = 0; i < t.rows; i++)
    for_each_vec<Vec<acc_t<S>>>(
        t.width, [&](int64_t j, auto part) { write_columns<S, H>(t, heads, j, w, erase, add, i, part); });
}

template <class S>
void memory_write_forward(const MemoryWriteArgs& a, int64_t b, int64_t begin, int64_t end, void* scratch) {
  using A = acc_t<S>;
  A *erase = static_cast<A*>(scratch), *add = erase + a.heads * a.width, *w = add + a.heads * a.width;
  widen_heads<S>(a.erase, a.erase_b, a.erase_h, a, b, erase);
  widen_heads<S>(a.add, a.add_b, a.add_h, a, b, add);
  for (int64_t n = begin; n < end; n += kWriteTile) {
    const int64_t rows = end - n < kWriteTile ? end - n : kWriteTile;
    widen_weights<S>(a, b, n, rows, w);
    const WriteRows<S> t{static_cast<const S*>(a.memory) + b * a.memory_b + n * a.memory_n,
                         nullptr,
                         static_cast<S*>(a.written) + b * a.written_b + n * a.written_n,
                         nullptr,
                         a.memory_n,
                         0,
                         a.written_n,
                         a.width,
                         rows,
                         false};
    switch (a.heads) {
      case 1:
        write_tile<S, 1>(t, 1, w, erase, add);
        break;
      case 2:
        write_tile<S, 2>(t, 2, w, erase, add);
        break;
      case 4:
        write_tile<S, 4>(t, 4, w, erase, add);
        break;
      default:
        write_tile<S, 0>(t, a.heads, w, erase, add);
    }
  }
}

// Reads the coming tile of both inputs and of dmemory into the cache in the order of the addresses, so that the
// hardware prefetcher follows: each pass over columns takes its share of the rows, a piece as wide as itself at each of
// its rows.
template <class S>
struct Fetch {
  const S *memory, *d, *dmemory;
  int64_t column, width, memory_skip, d_skip;

  MK_INLINE Fetch(const WriteRows<S>& t, int64_t j) : width(t.width) {
    const int64_t row = j * kWriteTile / t.width + kWriteTile;
    column = j * kWriteTile % t.width;
    memory = t.memory + row * t.memory_n + column, d = t.d + row * t.d_n + column;
    dmemory = t.dmemory ? t.dmemory + row * t.width + column : nullptr;
    memory_skip = t.memory_n - t.width, d_skip = t.d_n - t.width;
  }
  MK_INLINE void next(int64_t n) {
    constexpr int64_t kLine = 64 / int64_t(sizeof(S));
    for (int64_t k = 0; k < n; k += kLine) {
      __builtin_prefetch(memory + k);
      __builtin_prefetch(d + k);
      if (dmemory) __builtin_prefetch(dmemory + k, 1);
    }
    column += n, memory += n, d += n;
    if (dmemory) dmemory += n;
    if (column >= width) column -= width, memory += memory_skip, d += d_skip;
  }
};

// N vectors of columns from j on, H heads in registers; `erase` is negated. lanes[h][i][kLanes] gathers dweights over
// the columns of the tile.
template <class S, int H, int N, class Part>
MK_INLINE void gradient_columns(const WriteRows<S>& t, int64_t j, const acc_t<S>* w, const acc_t<S>* erase,
                                const acc_t<S>* add, acc_t<S>* derase, acc_t<S>* dadd, acc_t<S>* lanes, Part part) {
  using V = Vec<acc_t<S>>;
  constexpr int64_t L = V::kLanes;
  const V one = V::set1(1);
  V e[H][N], a[H][N], de[H][N], da[H][N];
  for (int h = 0; h < H; h++)
    for (int l = 0; l < N; l++) {
      const int64_t at = h * t.width + j + l * L;
      e[h][l] = load<V>(erase + at, part), a[h][l] = load<V>(add + at, part);
      de[h][l] = da[h][l] = V::zero();
    }
  Fetch<S> fetch(t, j);
  for (int64_t i = 0; i < t.rows; i++) {
    if (t.more) fetch.next(N * L);
    for (int l = 0; l < N; l++) {
      const V d = load<V>(t.d + i * t.d_n + j + l * L, part), m = load<V>(t.memory + i * t.memory_n + j + l * L, part);
      V kept[H], before[H];
      V product = one;
      for (int h = 0; h < H; h++) {
        kept[h] = fma(V::set1(w[h * kWriteTile + i]), e[h][l], one);
        before[h] = product;
        product = h ? product * kept[h] : kept[h];
      }
      if (t.dmemory) store(d * product, t.dmemory + i * t.width + j + l * L, part);
      V after = d * m;
      for (int h = H - 1; h >= 0; h--) {
        const V u = h ? before[h] * after : after, weight = V::set1(w[h * kWriteTile + i]);
        if (h) after = after * kept[h];
        de[h][l] = fma(weight, u, de[h][l]);
        da[h][l] = fma(weight, d, da[h][l]);
        acc_t<S>* sum = lanes + (h * kWriteTile + i) * L;
        fma(u, e[h][l], fma(d, a[h][l], V::load(sum))).store(sum);
      }
    }
  }
  for (int h = 0; h < H; h++)
    for (int l = 0; l < N; l++) {
      const int64_t at = h * t.width + j + l * L;
      store(load<V>(derase + at, part) - de[h][l], derase + at, part);
      store(load<V>(dadd + at, part) + da[h][l], dadd + at, part);
    }
}

// The same for any number of heads, one vector of columns: factors and prefix products lie in `factors`,
// [2][heads][kLanes].
template <class S, class Part>
void gradient_columns_many(const WriteRows<S>& t, int64_t heads, int64_t j, const acc_t<S>* w, const acc_t<S>* erase,
                           const acc_t<S>* add, acc_t<S>* derase, acc_t<S>* dadd, acc_t<S>* lanes, acc_t<S>* factors,
                           Part part) {
  using V = Vec<acc_t<S>>;
  constexpr int64_t L = V::kLanes;
  const V one = V::set1(1);
  acc_t<S>*de = factors + 2 * heads * L, *da = de + heads * L;
  for (int64_t i = 0; i < 2 * heads * L; i += L) V::zero().store(de + i);
  for (int64_t i = 0; i < t.rows; i++) {
    const V d = load<V>(t.d + i * t.d_n + j, part), m = load<V>(t.memory + i * t.memory_n + j, part);
    V product = one;
    for (int64_t h = 0; h < heads; h++) {
      const V kept = fma(V::set1(w[h * kWriteTile + i]), load<V>(erase + h * t.width + j, part), one);
      kept.store(factors + h * L);
      product.store(factors + (heads + h) * L);
      product = product * kept;
    }
    if (t.dmemory) store(d * product, t.dmemory + i * t.width + j, part);
    V after = d * m;
    for (int64_t h = heads - 1; h >= 0; h--) {
      const int64_t at = h * t.width + j;
      const V weight = V::set1(w[h * kWriteTile + i]), u = V::load(factors + (heads + h) * L) * after;
      after = after * V::load(factors + h * L);
      (V::load(de + h * L) - weight * u).store(de + h * L);
      fma(weight, d, V::load(da + h * L)).store(da + h * L);
      acc_t<S>* sum = lanes + (h * kWriteTile + i) * L;
      fma(u, load<V>(erase + at, part), fma(d, load<V>(add + at, part), V::load(sum))).store(sum);
    }
  }
  for (int64_t h = 0; h < heads; h++) {
    const int64_t at = h * t.width + j;
    store(load<V>(derase + at, part) + V::load(de + h * L), derase + at, part);
    store(load<V>(dadd + at, part) + V::load(da + h * L), dadd + at, part);
  }
}

template <class S, int H>
void gradient_tile(const WriteRows<S>& t, int64_t heads, const acc_t<S>* w, const acc_t<S>* erase, const acc_t<S>* add,
                   acc_t<S>* derase, acc_t<S>* dadd, acc_t<S>* lanes, acc_t<S>* factors) {
  constexpr int64_t L = Vec<acc_t<S>>::kLanes;
  constexpr int N = H == 1 ? 4 : H == 2 ? 2 : 1;
  const auto columns = [&](int64_t j, auto part) {
    if constexpr (H == 0)
      gradient_columns_many<S>(t, heads, j, w, erase, add, derase, dadd, lanes, factors, part);
    else
      gradient_columns<S, H, 1>(t, j, w, erase, add, derase, dadd, lanes, part);
  };
  int64_t j = 0;
  if constexpr (N > 1)
    for (; j + N * L <= t.width; j += N * L)
      gradient_columns<S, H, N>(t, j, w, erase, add, derase, dadd, lanes, Full{});
  for (; j + L <= t.width; j += L) columns(j, Full{});
  if (j < t.width) columns(j, Tail{t.width - j});
}

template <class S>
void memory_write_backward(const MemoryWriteArgs& a, int64_t b, int64_t begin, int64_t end, void* partial,
                           void* scratch) {
  using A = acc_t<S>;
  using V = Vec<A>;
  constexpr int64_t L = V::kLanes;
  A *derase = static_cast<A*>(partial), *dadd = derase + a.heads * a.width;
  A *erase = static_cast<A*>(scratch), *add = erase + a.heads * a.width, *w = add + a.heads * a.width;
  A *lanes = w + a.heads * kWriteTile, *factors = lanes + a.heads * kWriteTile * L;
  for (int64_t i = 0; i < 2 * a.heads * a.width; i++) derase[i] = 0;
  widen_heads<S>(a.erase, a.erase_b, a.erase_h, a, b, erase);
  for (int64_t i = 0; i < a.heads * a.width; i++) erase[i] = -erase[i];
  widen_heads<S>(a.add, a.add_b, a.add_h, a, b, add);
  for (int64_t n = begin; n < end; n += kWriteTile) {
    const int64_t rows = end - n < kWriteTile ? end - n : kWriteTile;
    widen_weights<S>(a, b, n, rows, w);
    for (int64_t i = 0; i < a.heads * kWriteTile * L; i += L) V::zero().store(lanes + i);
    const WriteRows<S> t{static_cast<const S*>(a.memory) + b * a.memory_b + n * a.memory_n,
                         static_cast<const S*>(a.dwritten) + b * a.dwritten_b + n * a.dwritten_n,
                         nullptr,
                         a.dmemory ? static_cast<S*>(a.dmemory) + (b * a.rows + n) * a.width : nullptr,
                         a.memory_n,
                         a.dwritten_n,
                         0,
                         a.width,
                         rows,
                         n + 2 * kWriteTile <= end};
    switch (a.heads) {
      case 1:
        gradient_tile<S, 1>(t, 1, w, erase, add, derase, dadd, lanes, factors);
        break;
      case 2:
        gradient_tile<S, 2>(t, 2, w, erase, add, derase, dadd, lanes, factors);
        break;
      case 3:
        gradient_tile<S, 3>(t, 3, w, erase, add, derase, dadd, lanes, factors);
        break;
      case 4:
        gradient_tile<S, 4>(t, 4, w, erase, add, derase, dadd, lanes, factors);
        break;
      default:
        gradient_tile<S, 0>(t, a.heads, w, erase, add, derase, dadd, lanes, factors);
    }
    if (!a.dweights) continue;
    for (int64_t h = 0; h < a.heads; h++) {
      S* out = static_cast<S*>(a.dweights) + (b * a.heads + h) * a.rows + n;
      for_each_vec<V>(
          rows, [&](int64_t i, auto part) { store(reduce_add_each(lanes + (h * kWriteTile + i) * L), out + i, part); });
    }
  }
}

template <class S>
void memory_write_combine(const MemoryWriteArgs& a, int64_t b, const void* partials, int64_t chunks) {
  using V = Vec<acc_t<S>>;
  const acc_t<S>* all = static_cast<const acc_t<S>*>(partials);
  const int64_t size = a.heads * a.width;
  for (int which = 0; which < 2; which++) {
    void* out = which ? a.dadd : a.derase;
    if (!out) continue;
    S* to = static_cast<S*>(out) + b * size;
    for_each_vec<V>(size, [&](int64_t i, auto part) {
      V sum = V::zero();
      for (int64_t c = 0; c < chunks; c++) sum = sum + load<V>(all + (2 * c + which) * size + i, part);
      store(sum, to + i, part);
    });
  }
}

}  // namespace

const MemoryWriteKernels memory_write = {
    MK_FLOAT_TYPES(memory_write_forward),
    MK_FLOAT_TYPES(memory_write_backward),
    MK_FLOAT_TYPES(memory_write_combine),
};

}  // namespace mk::cpu::MK_LEVEL
