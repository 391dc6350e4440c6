// Gradients of memory rows that queries have named by index: an inverse index, made by counting, then each row sums
// what its retrievals give it, in the order of heads, queries and slots, and is written once. The order depends on
// nothing else, so that any split of the rows gives the same bits.
#pragma once
#include <type_traits>

#include "cpu/generic/attention_block.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

template <int N>
struct Vectors {
  static constexpr int value = N;
};

template <class T>
MK_INLINE const T* row_at(const AttentionTensor& t, int64_t b, int64_t h, int64_t row) {
  return static_cast<const T*>(t.data) + b * t.b + h * t.h + row * t.row;
}

template <class A, class T>
MK_INLINE void widen(const T* from, int64_t n, A* to) {
  using V = Vec<A>;
  for_each_vec<V>(n, [&](int64_t j, auto part) { store(load<V>(from + j, part), to + j, part); });
}

// What one retrieval gives to its memory row: its weight first, then other factors.
template <class A, int N>
struct Given {
  int32_t head, query;
  A number[N];
};

// The retrievals of entry b by heads [first_head, last_head): index int64 [head][query][slot] by strides, and N numbers
// of each, [head][query][slot][N], from head 0 of the entry on.
template <class A>
struct Retrievals {
  const AttentionTensor& index;
  int64_t b, first_head, last_head, queries, slots;
  const A* numbers;
};

// Counts the retrievals of rows [first, last), of those whose weight is not 0, and hands each to put(place, head,
// query, numbers): places start[i - 1] .. start[i] belong to row first + i (from 0 for the first). C: what counts them.
template <class A, int N, class C, class Put>
MK_INLINE void invert_to(const Retrievals<A>& r, int64_t first, int64_t last, C* start, const Put& put) {
  const int64_t rows = last - first;
  const auto each = [&](const auto& body) {
    for (int64_t head = r.first_head; head < r.last_head; head++)
      for (int64_t query = 0; query < r.queries; query++) {
        const int64_t* index = row_at<int64_t>(r.index, r.b, head, query);
        const A* numbers = r.numbers + (head * r.queries + query) * r.slots * N;
        for (int64_t i = 0; i < r.slots; i++)
          if (uint64_t(index[i] - first) < uint64_t(rows) && numbers[N * i] != A(0))
            body(index[i] - first, head, query, numbers + N * i);
      }
  };
  for (int64_t i = 0; i <= rows; i++) start[i] = 0;
  each([&](int64_t row, int64_t, int64_t, const A*) { start[row + 1]++; });
  for (int64_t i = 1; i <= rows; i++) start[i] += start[i - 1];
  // start[row] moves to the end of its run, which is where the next one begins.
  each([&](int64_t row, int64_t head, int64_t query, const A* numbers) { put(start[row]++, head, query, numbers); });
}

template <class A, int N, class C>
void invert(const Retrievals<A>& r, int64_t first, int64_t last, C* start, Given<A, N>* given) {
  invert_to<A, N>(r, first, last, start, [&](int64_t place, int64_t head, int64_t query, const A* numbers) {
    Given<A, N>& to = given[place];
    to.head = int32_t(head), to.query = int32_t(query);
    for (int n = 0; n < N; n++) to.number[n] = numbers[n];
  });
}

// The same as numbers of retrievals, a quarter of the memory or less: what they give is looked up.
template <class A, int N, class C>
void invert(const Retrievals<A>& r, int64_t first, int64_t last, C* start, C* number) {
  invert_to<A, N>(r, first, last, start, [&](int64_t place, int64_t, int64_t, const A* numbers) {
    number[place] = C((numbers - r.numbers) / N - r.first_head * r.queries * r.slots);
  });
}
template <class A, int N, class C>
struct Numbered {
  const Retrievals<A>& r;
  const C* number;

  MK_INLINE Given<A, N> operator[](int64_t i) const {
    using U = std::make_unsigned_t<C>;
    const U row = U(number[i]) / U(r.slots), head = r.last_head - r.first_head == 1 ? 0 : row / U(r.queries);
    Given<A, N> out{int32_t(r.first_head + int64_t(head)), int32_t(row - head * U(r.queries)), {}};
    const A* numbers = r.numbers + (r.first_head * r.queries * r.slots + number[i]) * N;
    for (int n = 0; n < N; n++) out.number[n] = numbers[n];
    return out;
  }
};

// A row that very many queries retrieved is summed in pieces: rounding errors stay near those of a blocked sum.
constexpr int64_t kGivenPiece = 64;

// out = factor sum_i list[i].number[kNumber] rows[list[i].query], and with an `own` row + own_factor own; rounded
// once. `stream`: past_caches().
template <class A, class T, int kNumber, class List>
void write_memory_row(const AttentionTensor& rows, int64_t b, const List& list, int64_t count, int64_t width, A factor,
                      T* out, const T* own = nullptr, A own_factor = A(0), bool stream = false) {
  using V = Vec<A>;
  const auto columns = [&](int64_t j, auto part, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    V total[kVectors];
    for (int l = 0; l < kVectors; l++) total[l] = V::zero();
    for (int64_t begin = 0; begin < count; begin += kGivenPiece) {
      V sum[kVectors];
      for (int l = 0; l < kVectors; l++) sum[l] = V::zero();
      for (int64_t i = begin; i < smaller(begin + kGivenPiece, count); i++) {
        const auto& given = list[i];
        const V weight = V::set1(given.number[kNumber]);
        const T* row = row_at<T>(rows, b, given.head, given.query) + j;
        for (int l = 0; l < kVectors; l++) sum[l] = fma(weight, load<V>(row + l * V::kLanes, part), sum[l]);
      }
      for (int l = 0; l < kVectors; l++) total[l] = total[l] + sum[l];
    }
    for (int l = 0; l < kVectors; l++) {
      V sum = total[l] * V::set1(factor);
      if (own) sum = fma(V::set1(own_factor), load<V>(own + j + l * V::kLanes, part), sum);
      T* const to = out + j + l * V::kLanes;
      if constexpr (sizeof(T) == sizeof(A))
        if (stream) {
          sum.stream(to);
          continue;
        }
      store(sum, to, part);
    }
  };
  int64_t j = 0;
  for (; j + 4 * V::kLanes <= width; j += 4 * V::kLanes) columns(j, Full{}, Vectors<4>{});
  for (; j + V::kLanes <= width; j += V::kLanes) columns(j, Full{}, Vectors<1>{});
  if (j < width) columns(j, Tail{width - j}, Vectors<1>{});
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
