// More than kFewRows queries a head of quantized_attention.inl.h: they lie in the lanes of vectors, see
// attention_lanes.inl.h.
#pragma once
#include "cpu/generic/attention_lanes.inl.h"
#include "cpu/quantized_attention.h"

namespace mk::cpu::MK_LEVEL {
namespace {

constexpr int64_t kQuantizedRows = kLaneQueries;  // query rows of one task

// Numbers of row r of the task lie at r, its vectors packed by their width, its scores at r * kTile. In lanes: rows of
// sums are whole vectors, and scores those of attention_lanes.inl.h.
template <class A>
struct QuantizedScratch {
  A *query, *dout, *sums, *scores, *gradients, *base, *powers, *delta, *key_factor, *value_factor;
  A *query_lanes, *dout_lanes, *shrink, *room;
  int32_t* index;
  int64_t used;

  QuantizedScratch(const QuantizedAttentionArgs& a, void* memory) : used(0) {
    const int64_t group = a.key_heads ? a.heads / a.key_heads : 0, all = group * a.queries;
    const int64_t rows = padded<A>(smaller(all, kQuantizedRows)), widest = padded<A>(larger(a.width, a.value_width));
    const auto take = [&](int64_t count) {  // whole cache lines, and a vector of room
      A* at = reinterpret_cast<A*>(static_cast<char*>(memory) + used);
      used += (count * int64_t(sizeof(A)) + 127) / 64 * 64;
      return at;
    };
    query = take(rows * a.width), dout = take(rows * a.value_width), sums = take(rows * widest);
    scores = take(rows * kTile), gradients = take(rows * kTile);
    base = take(rows), powers = take(rows), delta = take(rows);
    key_factor = take(kTile), value_factor = take(kTile);
    query_lanes = take(rows * a.width), dout_lanes = take(rows * a.value_width);
    shrink = take(rows), room = take(kTile * widest);
    index = reinterpret_cast<int32_t*>(take(kTile));
    for (int64_t i = 0; memory && i < kTile; i++) index[i] = int32_t(i);
  }
};

// A tile of bytes, widened to rows of whole vectors.
template <class A>
void widen(const Rows<signed8<A>>& tile, A* room) {
  using V = Vec<A>;
  const int64_t row = padded<A>(tile.width);
  for (int64_t i = 0; i < tile.count; i++)
    for_each_vec<V>(tile.width,
                    [&](int64_t j, auto part) { load<V>(tile.row(i) + j, part).store(room + i * row + j); });
}

// What products fetch meanwhile: nothing where between its rows lie those of other heads.
template <class A>
const void* fetched(const Rows<signed8<A>>& tile) {
  return tile.stride == tile.width ? tile.ahead : nullptr;
}

// out[i][lane] = row i of the tile . vector of the lane; the tile is widened into `room`.
template <class A>
void widened_products(const Rows<signed8<A>>& tile, const A* vectors, int64_t lanes, A* room, A* out) {
  widen(tile, room);
  product<A>(
      {room, padded<A>(tile.width), 1, vectors, tile.width, 0, out, lanes, 0, fetched(tile), tile.count * tile.width},
      tile.count, lanes, 0, lanes, tile.width, nullptr, false);
}

// sums[r] = shrink[r] sums[r] + weights of lane r times the rows of the tile, which was widened into `room`.
template <class A>
void add_widened(const Rows<signed8<A>>& tile, const A* room, int64_t n, const A* weights, int64_t lanes,
                 const A* shrink, A* sums) {
  const int64_t row = padded<A>(tile.width);
  product<A>({weights, 1, lanes, room, 0, 0, sums, row, row, fetched(tile), tile.count * tile.width}, n, tile.width, 0,
             tile.width, tile.count, shrink, true);
}

// Row i of the numbers in lanes times factor[i].
template <class A>
void scale_lanes(A* numbers, const A* factor, int64_t count, int64_t lanes) {
  using V = Vec<A>;
  for (int64_t i = 0; i < count; i++)
    for (int64_t j = 0; j < lanes; j += V::kLanes)
      (V::load(numbers + i * lanes + j) * V::set1(factor[i])).store(numbers + i * lanes + j);
}

template <class A>
void forward_tile_in_lanes(const QuantizedScratch<A>& w, const Rows<signed8<A>>& keys, const Rows<signed8<A>>& values,
                           int64_t n) {
  const int64_t lanes = padded<A>(n);
  widened_products(keys, w.query_lanes, lanes, w.room, w.scores);
  scale_lanes(w.scores, w.key_factor, keys.count, lanes);
  lane_softmax(w.scores, keys.count, lanes, A(1), w.base, w.powers, w.shrink);
  scale_lanes(w.scores, w.value_factor, keys.count, lanes);
  widen(values, w.room);
  add_widened<A>(values, w.room, n, w.scores, lanes, w.shrink, w.sums);
}

template <class A>
void backward_tile_in_lanes(const QuantizedScratch<A>& w, const Rows<signed8<A>>& keys, const Rows<signed8<A>>& values,
                            int64_t n) {
  using V = Vec<A>;
  const int64_t lanes = padded<A>(n);
  widened_products(values, w.dout_lanes, lanes, w.room, w.gradients);
  widened_products(keys, w.query_lanes, lanes, w.room, w.scores);
  for (int64_t j = 0; j < lanes; j += V::kLanes) {
    const V base = V::load(w.base + j), unit = V::set1(1) / V::load(w.powers + j), less = V::load(w.delta + j);
    for (int64_t i = 0; i < keys.count; i++) {
      const V factor = V::set1(w.key_factor[i]), weight = power_of(V::load(w.scores + i * lanes + j), factor, base);
      A* gradient = w.gradients + i * lanes + j;
      (weight * unit * (V::load(gradient) * V::set1(w.value_factor[i]) - less) * factor).store(gradient);
    }
  }
  Rows<signed8<A>> again = keys;  // as they lie in `room`
  again.ahead = nullptr;
  add_widened<A>(again, w.room, n, w.gradients, lanes, nullptr, w.sums);
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
